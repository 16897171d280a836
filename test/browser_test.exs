defmodule VivaTensor.BrowserTest do
  # One browser, and its windows, for all tests.
  use ExUnit.Case, async: false

  import VivaTensor.Test.Jobs

  alias VivaTensor.{Compare, Native, Page}
  alias VivaTensor.Test.{Browser, Directory, Pages, Safetensors}

  @moduletag timeout: 600_000

  unless Browser.executable() do
    reason = "no Chromium here: pages are not looked at in a browser"
    IO.puts(:stderr, "\n#{inspect(__MODULE__)} DOES NOT RUN: #{reason}\n")
    @moduletag skip: reason
  end

  @sizes [{360, 740}, {1280, 900}]
  @model "examples/models/viva-tiny"

  setup do
    dir = Directory.create!()
    {:ok, browser} = Browser.start(Path.join(dir, "browser"))
    on_exit(fn -> Browser.stop(browser) end)
    {:ok, dir: dir, browser: browser}
  end

  defp write!(c, data) do
    {:ok, page} = Page.render(data)
    path = Path.join(c.dir, "page.html")
    File.write!(path, page)
    path
  end

  # Opens a page in every size and scheme.
  defp each_way(c, path, look) do
    for size <- @sizes, scheme <- ~w(light dark) do
      assert {[], _, _} = {Browser.open(c.browser, path, size, scheme), size, scheme}
      look.({size, scheme})
    end
  end

  # Elements that stick out of the window, but for what scrolls by itself.
  @sticking_out """
  [...document.querySelectorAll("body *")].filter(element => {
    const {left, right, width} = element.getBoundingClientRect();
    const inside = element.parentElement.closest(".scroll");
    return width > 0 && !inside && (left < -0.5 || right > innerWidth + 0.5);
  }).map(element => element.outerHTML.slice(0, 120)).concat(
    document.documentElement.scrollWidth > innerWidth ? ["the page scrolls sideways"] : [])
  """

  # Text and marks that are hard to see on what is behind them: WCAG's ratios.
  @too_faint """
  (() => {
    const parse = colour => colour.match(/[\\d.]+/g).map(Number);
    const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    const behind = element => {
      for (; element; element = element.parentElement) {
        const colour = parse(getComputedStyle(element).backgroundColor);
        if (colour.length < 4 || colour[3] > 0) return colour;
      }
      return [255, 255, 255];
    };
    const ratio = (element, colour) => {
      const [a, b] = [light(parse(colour)), light(behind(element))].sort((a, b) => b - a);
      return (a + 0.05) / (b + 0.05);
    };
    const faint = [];
    for (const element of document.querySelectorAll("body *")) {
      const style = getComputedStyle(element);
      const svg = element instanceof SVGElement;
      const text = [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim());
      if (text && !element.matches("script, style, title")) {
        if (ratio(element, svg ? style.fill : style.color) < 4.5) faint.push(element.outerHTML);
      } else if (element.matches(".mark > .quantized, .mark > .kept, .mark > .verified, .dot")) {
        if (ratio(element, style.fill) < 3) faint.push(element.outerHTML);
      }
    }
    return faint.slice(0, 5);
  })()
  """

  @unnamed """
  [...document.querySelectorAll("figure, section, [role=region], .mark")].filter(element => {
    const by = element.getAttribute("aria-labelledby");
    const named = element.matches(".mark") ? element.querySelector(":scope > title")
      : by ? document.getElementById(by) : element.getAttribute("aria-label");
    return !named;
  }).map(element => element.outerHTML.slice(0, 120))
  """

  defp assert_readable(c, path) do
    each_way(c, path, fn way ->
      assert {[], ^way} = {Browser.evaluate(c.browser, @sticking_out), way}
      assert {[], ^way} = {Browser.evaluate(c.browser, @too_faint), way}
      assert Browser.evaluate(c.browser, @unnamed) == []
      picture(c, way)
    end)

    # Paper is white, whatever the scheme of the screen.
    Browser.media(c.browser, "print", "dark")
    background = "getComputedStyle(document.body).backgroundColor"
    assert Browser.evaluate(c.browser, background) == "rgb(255, 255, 255)"
    assert Browser.evaluate(c.browser, @too_faint) == []
    assert <<"%PDF", _::binary>> = Browser.pdf(c.browser)
  end

  # To be looked at: VIVA_TENSOR_SCREENSHOTS=DIR mix test test/browser_test.exs
  defp picture(c, {{width, _height}, scheme}) do
    if to = System.get_env("VIVA_TENSOR_SCREENSHOTS") do
      name = c.test |> to_string() |> String.replace(~r/\W+/, "-")
      File.mkdir_p!(to)
      png = Browser.screenshot(c.browser)
      File.write!(Path.join(to, "#{name}-#{width}-#{scheme}.png"), png)
    end
  end

  test "the page that a job writes can be read, and asks for nothing", c do
    to = Path.join(c.dir, "out")
    {:ok, _} = run(source: @model, to: to, format: :nf4, double_quant: true)
    path = Path.join(to, "report.html")
    assert_readable(c, path)

    # Twenty tensors in the table, a dot for each that is quantized, a bar for each.
    Browser.open(c.browser, path, {1280, 900}, "light")
    count = &Browser.evaluate(c.browser, "document.querySelectorAll('#{&1}').length")
    assert count.("#tensors tbody tr") == 20
    assert count.("#quality .dot") == 14
    assert count.("#time .mark") == 20
    assert count.("#sizes .mark") == 4
  end

  test "a page of hundreds of tensors can be read", c do
    assert_readable(c, write!(c, Pages.job(400)))
  end

  test "a page of a comparison can be read", c do
    options = [formats: [:int3, :int4, :nf4, :int8, :sparse24], methods: [:rtn, :mse, :hqq]]
    {:ok, compared} = Compare.run(@model, [histograms: true] ++ options)
    {:ok, json} = compared |> Map.from_struct() |> Native.json_encode(false)
    {:ok, data} = Native.json_decode(json)
    assert_readable(c, write!(c, data))

    Browser.open(c.browser, Path.join(c.dir, "page.html"), {1280, 900}, "light")
    marks = Browser.evaluate(c.browser, "document.querySelectorAll('#front .mark').length")
    assert marks == length(compared.rows)
    # The drawing, then its points.
    for _ <- 1..2, do: Browser.press(c.browser, "Tab")
    said = Browser.evaluate(c.browser, "document.querySelector('#front output').value")
    assert said =~ ~r/^\w+ (rtn|mse|hqq): [\d.]+, [\d.]+$/
  end

  test "a page of vectors can be read", c do
    vectors = for seed <- 1..40, do: Safetensors.normal(32, seed)
    to = Path.join(c.dir, "out")
    {:ok, _} = run(vectors: vectors, dimension: 32, dtype: :f32, to: to, codes: :binary)
    assert_readable(c, Path.join(to, "report.html"))
  end

  test "names are text, however long and whatever is in them", c do
    hostile = ~s[layers.0.<img src=x onerror="alert(1)"><script>alert(2)</script>.weight]
    long = "layers.0." <> String.duplicate("a_very_long_name", 12) <> ".weight"
    data = Pages.job(9)
    [first, second | rows] = data["tensors"]
    rows = [%{first | "name" => hostile}, %{second | "name" => long} | rows]
    aside = [%{"name" => hostile, "reason" => long, "attempts" => 3}]
    data = %{data | "tensors" => rows, "quarantined" => aside, "source" => "<script>alert(3)"}
    assert_readable(c, write!(c, data))
    assert Browser.evaluate(c.browser, "document.images.length") == 0
    assert Browser.evaluate(c.browser, "document.scripts.length") == 1
    assert Browser.evaluate(c.browser, "document.title") == "<script>alert(3) → large-nf4"
  end

  test "the keyboard reaches every plot with one stop, and every mark with arrows", c do
    [] = Browser.open(c.browser, write!(c, Pages.job(30)), {1280, 900}, "light")

    stops =
      for _ <- 1..5 do
        Browser.press(c.browser, "Tab")
        Browser.evaluate(c.browser, "document.activeElement.closest('section').id")
      end

    assert stops == ~w(sizes quality time kept tensors)

    Browser.evaluate(c.browser, "document.querySelector('#quality .mark').focus()")

    said = fn ->
      Browser.evaluate(c.browser, "document.querySelector('#quality output').value")
    end

    first = said.()
    assert first =~ ~r/^model\.layers\.\d+\..* dB$/
    Browser.press(c.browser, "ArrowRight")
    second = said.()
    assert second != first
    Browser.press(c.browser, "ArrowLeft")
    assert said.() == first
    Browser.press(c.browser, "End")
    last = said.()
    assert last not in [first, second]

    # From a mark to the row of its tensor.
    Browser.press(c.browser, "Enter")
    row = Browser.evaluate(c.browser, "document.querySelector('tr:target td').textContent")
    assert String.starts_with?(last, row <> ": ")
  end
end

defmodule VivaTensor.Page.Parts do
  @moduledoc false
  # What the sections of a page are made of: tiles, tables, legends, plots with marks that
  # can be reached, and how figures are written.

  import VivaTensor.Markup, only: [element: 2, element: 3]

  alias VivaTensor.{Markup, Size}
  alias VivaTensor.Plot.Axis

  @type section :: Markup.element() | nil

  @doc "A section with its heading, and a line that says what it shows."
  @spec section(String.t(), String.t(), Markup.content(), Markup.content()) :: section
  def section(id, title, about, content) do
    element("section", [id: id, "aria-labelledby": "#{id}-title"], [
      element("h2", [id: "#{id}-title"], title),
      about && element("p", [class: "about"], about),
      content
    ])
  end

  @doc "Figures at a glance: what they are of, the figure, and a remark. `nil` is none."
  @spec tiles([{String.t(), Markup.content(), Markup.content()} | nil]) :: Markup.element()
  def tiles(tiles) do
    element(
      "dl",
      [class: "tiles"],
      for {name, figure, remark} <- tiles do
        element("div", [], [
          element("dt", [], name),
          element("dd", [], [figure, remark && element("small", [], remark)])
        ])
      end
    )
  end

  @typedoc "A column: its title, and what it holds: short words, a text that may need lines, or numbers."
  @type column :: {String.t(), :text | :long | :number}

  @doc "A table that scrolls by itself where it is wider than the page. Rows are `{attributes, cells}`."
  @spec table(String.t(), [column], [{keyword, [Markup.content()]}]) :: Markup.element()
  def table(label, columns, rows) do
    head =
      for {title, kind} <- columns, do: element("th", [scope: "col", class: class(kind)], title)

    body =
      for {attributes, cells} <- rows do
        cells =
          for {cell, {_, kind}} <- Enum.zip(cells, columns),
              do: element("td", [class: class(kind)], cell)

        element("tr", attributes, cells)
      end

    element(
      "div",
      [class: "scroll", role: "region", tabindex: 0, "aria-label": label],
      element("table", [], [
        element("thead", [], element("tr", [], head)),
        element("tbody", [], body)
      ])
    )
  end

  defp class(:number), do: "number"
  defp class(:long), do: "long"
  defp class(:text), do: nil

  @doc "What the colours of a plot say."
  @spec legend([{class :: String.t(), String.t()}]) :: Markup.element()
  def legend(entries) do
    element(
      "ul",
      [class: "legend"],
      for {class, name} <- entries do
        swatch = element("svg", [width: 12, height: 12, "aria-hidden": "true"], full(class))
        element("li", [], [swatch, name])
      end
    )
  end

  defp full(class), do: element("rect", class: class, width: "100%", height: "100%", rx: 2)

  @doc "A plot. What its marks are called is shown below it while one has the focus or the pointer."
  @spec plot(String.t(), Markup.content()) :: Markup.element()
  def plot(label, content) do
    element("figure", [class: "plot", role: "group", "aria-label": label], [
      content,
      element("figcaption", [], element("output", [], nil))
    ])
  end

  @doc "A mark of a plot, called `title`; it leads to `href`, if there is one."
  @spec mark(String.t(), String.t() | nil, Markup.content()) :: Markup.element()
  def mark(title, href, shape) do
    content = [element("title", [], title), shape]

    if href,
      do: element("a", [class: "mark", href: href], content),
      else: element("g", [class: "mark", role: "img"], content)
  end

  @doc "Rows of a plot: what each is called, what is drawn, and a figure, beside each other."
  @spec rows([{Markup.content(), Markup.content(), Markup.content()}]) :: Markup.element()
  def rows(rows) do
    element(
      "ul",
      [class: "rows"],
      for {name, drawn, figure} <- rows do
        element("li", [], [
          element("span", [class: "name"], name),
          element("span", [class: "drawn"], drawn),
          element("span", [class: "figure"], figure)
        ])
      end
    )
  end

  @doc "A drawing as wide as there is room."
  @spec drawing(pos_integer, Markup.content()) :: Markup.element()
  def drawing(height, content), do: element("svg", [width: "100%", height: height], content)

  @doc "The lines of an axis' ticks in a drawing."
  @spec grid(Axis.t()) :: [Markup.element()]
  def grid(axis) do
    for tick <- axis.ticks, x = percent(Axis.part(axis, tick)) do
      element("line", class: "grid", x1: x, x2: x, y1: 0, y2: "100%")
    end
  end

  @doc "The numbers of an axis' ticks, with its unit."
  @spec scale(Axis.t(), String.t()) :: Markup.element()
  def scale(axis, unit) do
    numbers =
      for tick <- axis.ticks, part = Axis.part(axis, tick) do
        anchor = if part < 0.04, do: "start", else: if(part > 0.96, do: "end", else: "middle")
        attributes = [class: "tick", x: percent(part), y: 13, "text-anchor": anchor]
        element("text", attributes, Axis.number(tick))
      end

    unit = element("text", [class: "tick", x: "50%", y: 29, "text-anchor": "middle"], unit)
    element("svg", [width: "100%", height: 34, "aria-hidden": "true"], [numbers, unit])
  end

  @doc """
  A part of one as SVG takes it.

      iex> VivaTensor.Page.Parts.percent(0.25)
      "25.0%"
  """
  @spec percent(number) :: String.t()
  def percent(part), do: "#{Float.round(part * 100.0, 3)}%"

  @doc """
  The first `most` of a list in the order of the list, by the largest `by`; and a sentence
  where that is not all.

      iex> VivaTensor.Page.Parts.at_most([3, 9, 5], 2, & &1, "the largest bars")
      {[9, 5], " Drawn are 2 of 3: the largest bars."}
      iex> VivaTensor.Page.Parts.at_most([3, 9, 5], 3, & &1, "the largest bars")
      {[3, 9, 5], ""}
  """
  @spec at_most([item], pos_integer, (item -> number), String.t()) :: {[item], String.t()}
        when item: term
  def at_most(items, most, by, which) do
    case length(items) do
      count when count <= most ->
        {items, ""}

      count ->
        chosen =
          items
          |> Enum.with_index()
          |> Enum.sort_by(fn {item, index} -> {-by.(item), index} end)
          |> Enum.take(most)
          |> Enum.sort_by(&elem(&1, 1))
          |> Enum.map(&elem(&1, 0))

        {chosen, " Drawn are #{count(most)} of #{count(count)}: #{which}."}
    end
  end

  @doc """
  A whole number with its thousands apart.

      iex> VivaTensor.Page.Parts.count(1234567)
      "1,234,567"
  """
  @spec count(integer) :: String.t()
  def count(number) do
    number |> Integer.to_string() |> String.replace(~r/(?<=\d)(?=(\d{3})+$)/, ",")
  end

  @doc "A number with so many decimals; nothing if it is none."
  @spec decimals(term, non_neg_integer) :: String.t() | nil
  def decimals(number, digits) when is_number(number),
    do: :erlang.float_to_binary(number / 1, decimals: digits)

  def decimals(_other, _digits), do: nil

  @doc "A size, if it is one."
  @spec size(term) :: String.t() | nil
  def size(bytes) when is_integer(bytes) and bytes >= 0, do: Size.format(bytes)
  def size(_other), do: nil

  @doc """
  A time for people.

      iex> for s <- [0.00042, 0.0421, 12.34, 75, 7265], do: VivaTensor.Page.Parts.time(s)
      ["0.42 ms", "42 ms", "12.3 s", "1 min 15 s", "2 h 1 min"]
  """
  @spec time(number) :: String.t()
  def time(seconds) when seconds < 0.01, do: decimals(seconds * 1000, 2) <> " ms"
  def time(seconds) when seconds < 0.9995, do: decimals(seconds * 1000, 0) <> " ms"
  def time(seconds) when seconds < 60, do: decimals(seconds, 1) <> " s"

  def time(seconds) when seconds < 3600 do
    whole = round(seconds)
    "#{div(whole, 60)} min #{rem(whole, 60)} s"
  end

  def time(seconds) do
    minutes = round(seconds / 60)
    "#{div(minutes, 60)} h #{rem(minutes, 60)} min"
  end

  @doc "A word or number of a report, whatever it is."
  @spec text(term) :: String.t()
  def text(value) when is_binary(value) or is_number(value), do: to_string(value)
  def text(value), do: inspect(value)

  @doc """
  How much less bytes are, or more.

      iex> {VivaTensor.Page.Parts.change(300, 100), VivaTensor.Page.Parts.change(100, 150)}
      {"3.00x smaller", "1.50x larger"}
  """
  @spec change(non_neg_integer, non_neg_integer) :: String.t()
  def change(before, now) when now <= before and now > 0,
    do: "#{decimals(before / now, 2)}x smaller"

  def change(before, now), do: "#{decimals(now / max(before, 1), 2)}x larger"

  @doc "The tile of how long a job took."
  @spec duration(map) :: {String.t(), String.t(), String.t()}
  def duration(%{"seconds" => seconds, "bytes_per_second" => rate}),
    do: {"Time", time(seconds), "#{size(round(rate))}/s"}

  @doc "What was done to those of these rows of a report that were not kept."
  @spec done([map]) :: String.t()
  def done(rows),
    do: if(Enum.any?(rows, &(&1["action"] == "convert")), do: "converted", else: "quantized")

  @doc "What the page of a job is called."
  @spec title(map) :: String.t()
  def title(report), do: "#{base(report["source"], "a stream")} → #{base(report["target"], "?")}"

  defp base(path, _else) when is_binary(path), do: Path.basename(path)
  defp base(_none, other), do: other

  @doc "The code-like name of a thing."
  @spec code(String.t()) :: Markup.element()
  def code(name), do: element("code", [], name)

  @doc "From where to where a job went, and by which program."
  @spec origin(map) :: Markup.content()
  def origin(report) do
    from = if is_binary(report["source"]), do: code(report["source"]), else: "a stream"

    identity =
      if is_binary(report["identity"]),
        do: [", identity ", code(String.slice(report["identity"], 0, 12))]

    [
      element("p", [], [from, " → ", code(text(report["target"])), identity]),
      program(report["versions"])
    ]
  end

  defp program(%{"viva_tensor" => version, "elixir" => elixir, "otp" => otp}) do
    versions = "viva_tensor #{text(version)}, Elixir #{text(elixir)}, OTP #{text(otp)}"
    element("p", [], versions)
  end

  defp program(_unknown), do: nil

  @doc "One thing, or many of it."
  @spec plural(integer, String.t()) :: String.t()
  def plural(1, what), do: "1 #{what}"
  def plural(number, what), do: "#{count(number)} #{what}s"
end

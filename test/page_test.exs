defmodule VivaTensor.PageTest do
  # Tasks write to standard output.
  use ExUnit.Case, async: false
  doctest VivaTensor.CLI.Report
  doctest VivaTensor.Markup
  doctest VivaTensor.Page
  doctest VivaTensor.Page.Parts

  import VivaTensor.Test.Jobs

  alias Mix.Tasks.Viva
  alias VivaTensor.{Native, Page, Test}
  alias VivaTensor.Test.{Directory, Pages}

  @model "examples/models/viva-tiny"

  setup do
    dir = Directory.create!()
    {:ok, dir: dir, to: Path.join(dir, "out")}
  end

  defp page!(data) do
    {:ok, page} = Page.render(data)
    IO.iodata_to_binary(page)
  end

  describe "the page of a job" do
    test "is written beside its report, and by mix viva.report again", c do
      {:ok, report} = run(source: @model, to: c.to, format: :nf4, double_quant: true)
      html = File.read!(Path.join(c.to, "report.html"))
      for row <- report.tensors, do: assert(html =~ "<code>#{row.name}</code>")
      assert html =~ "<h1>viva-tiny → out</h1>"
      assert html =~ "block_size 64, double_quant, method rtn"

      file = Path.join(c.dir, "a.html")
      assert {0, stdout, ""} = Test.Task.run(Viva.Report, [c.to, "--to", file])
      assert stdout =~ "a.html: "
      assert File.read!(file) == html
      # The source's pages are of another job.
      {:ok, _} = run(source: @model, to: c.to <> "2", format: :nf4)
      File.write!(Path.join(c.to <> "2", "report.html"), "another")
      again = [source: c.to <> "2", to: c.to <> "3", convert: :plain]
      {:ok, _} = run(again)
      assert File.read!(Path.join(c.to <> "3", "report.html")) =~ "out2 → out3"
    end

    test "tells what was put aside", c do
      source = weights(Path.join(c.dir, "in/model.safetensors"), poison: :nan)
      {:partial, _} = run(source: source, to: c.to, format: :nf4)
      file = Path.join(c.dir, "a.html")
      assert {0, _, ""} = Test.Task.run(Viva.Report, [c.to, "--to", file])
      assert File.read!(file) =~ "1 tensor could not be done"
      assert File.read!(file) =~ "1 NaN"
    end

    test "fetches nothing and runs no script but its own" do
      html = page!(Pages.job(3))
      refute html =~ ~r/(?:src|href)="(?!#|data:)/
      refute html =~ ~r/url\(|@import/
      assert html =~ "default-src 'none'"
      assert [[_, script]] = Regex.scan(~r/<script>(.*?)<\/script>/s, html)
      assert html =~ "'sha256-#{Base.encode64(:crypto.hash(:sha256, script))}'"
    end

    test "takes names for text, whatever they are" do
      name = ~s[layers.0."><script>alert(1)</script>&amp;.weight]

      html =
        Pages.job(2)
        |> Map.update!("tensors", fn [row | rows] -> [%{row | "name" => name} | rows] end)
        |> Map.put("source", "<b>")
        |> page!()

      refute html =~ "<script>alert"
      refute html =~ "<b>"
      assert html =~ "&quot;&gt;&lt;script&gt;alert(1)&lt;/script&gt;&amp;amp;.weight"
    end

    test "says how much of many tensors is drawn, and stays small" do
      html = page!(Pages.job(20_000))
      assert byte_size(html) < 4_000_000
      assert html =~ "Drawn are 2,000 of 20,000: the longest units."
      assert html =~ "Drawn are 2,000 of 17,778: those with the lowest SQNR."
      assert html =~ "The first 5,000 of 20,000; report.json has all."
      # No mark leads to a row that is not there.
      ids = for [_, id] <- Regex.scan(~r/id="(t\d+)"/, html), into: MapSet.new(), do: id
      for [_, id] <- Regex.scan(~r/href="#(t\d+)"/, html), do: assert(id in ids)
    end

    test "of nothing, or of a job without times, has no empty sections" do
      assert page!(Map.merge(Pages.job(0), %{"output_bytes" => 0, "input_bytes" => 0})) =~ "<h1>"
      assert page!(Pages.job(3)) =~ "Time line"
      rows = for row <- Pages.job(3)["tensors"], do: Map.drop(row, ["began", "ended", "worker"])
      refute page!(%{Pages.job(3) | "tensors" => rows}) =~ "Time line"
    end
  end

  test "the page of a job of vectors has its recall and the sizes of its parts", c do
    opts = [dimension: 32, dtype: :f32, codes: :binary, queries: 4]
    vectors = for seed <- 1..40, do: Test.Safetensors.normal(32, seed)
    {:ok, report} = run([vectors: vectors, to: c.to] ++ opts)
    html = File.read!(Path.join(c.to, "report.html"))
    assert html =~ "<h1>a stream → out</h1>"
    assert html =~ "binary codes, scored again by int8, cosine"
    for search <- ["by codes alone", "the best scored again"], do: assert(html =~ search)
    for file <- report.files, do: assert(html =~ Path.rootname(file.name))

    {:ok, data} = c.to |> Path.join("report.json") |> File.read!() |> Native.json_decode()
    assert page!(data) == html
    refute page!(%{data | "recall" => nil}) =~ "Recall"
    refute page!(put_in(data["recall"]["codes"], "all")) =~ "by codes alone"
    assert {:error, _} = Page.render(%{data | "vectors" => -1})
  end

  describe "the page of a comparison" do
    setup c do
      argv = [@model, "--formats", "nf4,int4,int8,sparse24", "--methods", "rtn,hqq", "--json"]
      {0, json, _} = Test.Task.run(Viva.Compare, argv)
      path = Path.join(c.dir, "compared.json")
      File.write!(path, json)
      {:ok, compared} = Native.json_decode(json)
      {:ok, path: path, compared: compared}
    end

    test "has its front, the codebooks on it, every format and what is absent", c do
      assert {0, stdout, ""} = Test.Task.run(Viva.Report, [c.path])
      assert stdout =~ "compared.html: "
      html = File.read!(Path.join(c.dir, "compared.html"))
      assert html =~ "<h1>Formats on viva-tiny</h1>"
      assert html =~ "14 tensors, 1,179,648 weights together"
      assert html =~ "SQNR of the weights, dB"
      front = for row <- c.compared["rows"], row["front"], do: row
      assert length(front) in 2..(length(c.compared["rows"]) - 1)

      for row <- c.compared["rows"] do
        assert html =~ "#{row["format"]} #{row["method"]}"
        # Millions of weights are counted for what nothing beats alone.
        assert is_map(row["histogram"]) == row["front"]
        drawn = "aria-label=\"Weights against the values of #{row["format"]} #{row["method"]}\""
        assert html =~ drawn == row["front"]
      end

      assert html =~ "the format has no such method"
      assert html =~ "nf4 hqq, sparse24 hqq"
    end

    test "without histograms has none, and of other rows there is no page", c do
      rows = for row <- c.compared["rows"], do: Map.delete(row, "histogram")
      refute page!(%{c.compared | "rows" => rows}) =~ "codebook"
      assert page!(%{c.compared | "rows" => []}) =~ "Formats on"
      [row | rows] = c.compared["rows"]

      for wrong <- [%{row | "bits_per_weight" => "4"}, %{row | "format" => nil}, 1] do
        assert {:error, _} = Page.render(%{c.compared | "rows" => [wrong | rows]})
      end

      for wrong <- [[1], %{"weights" => [1, -1], "values" => [1, 1]}, %{"weights" => []}] do
        assert page!(%{c.compared | "rows" => [%{row | "histogram" => wrong}]}) =~ "Every format"
      end
    end
  end

  test "workers of several nodes have lanes of their own" do
    rows =
      for {row, index} <- Enum.with_index(Pages.job(16)["tensors"]),
          do: Map.put(row, "node", if(index > 7, do: "b@host"))

    html = page!(%{Pages.job(16) | "tensors" => rows})
    assert html =~ "What each of 16 workers did"
    assert html =~ ">worker 3<" and html =~ ">b@host worker 3<"
  end

  test "mix viva.report says what is wrong", c do
    File.write!(c.to, "{}")
    assert {3, "", stderr} = Test.Task.run(Viva.Report, [c.to])
    assert stderr =~ "neither the report of a job"
    File.write!(c.to, "{")
    assert {3, "", _} = Test.Task.run(Viva.Report, [c.to])
    assert {3, "", stderr} = Test.Task.run(Viva.Report, [Path.join(c.dir, "none")])
    assert stderr =~ "no such file"
    assert {2, "", stderr} = Test.Task.run(Viva.Report, [])
    assert stderr =~ "which PATH?"
    assert {2, "", stderr} = Test.Task.run(Viva.Report, ["a", "b"])
    assert stderr =~ ~s(what is "b"?)

    {:ok, json} = Native.json_encode(Pages.job(3), false)
    path = Path.join(c.dir, "a.json")
    html = Path.join(c.dir, "a.html")
    File.write!(path, json)
    assert {0, _, ""} = Test.Task.run(Viva.Report, [path])
    page = File.read!(html)
    File.write!(html, "mine")
    assert {4, "", stderr} = Test.Task.run(Viva.Report, [path])
    assert stderr =~ "--force"
    assert File.read!(html) == "mine"
    assert {0, _, ""} = Test.Task.run(Viva.Report, [path, "--force"])
    assert File.read!(html) == page
    assert {4, "", _} = Test.Task.run(Viva.Report, [path, "--to", "/no/such/dir/a.html"])
    assert c.dir |> File.ls!() |> Enum.sort() == ["a.html", "a.json", "out"]
  end
end

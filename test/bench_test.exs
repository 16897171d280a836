defmodule VivaTensor.BenchTest do
  # The task writes to standard output and standard error.
  use ExUnit.Case, async: false
  doctest VivaTensor.CLI.Bench

  import ExUnit.CaptureIO

  alias Mix.Tasks.Viva.Bench
  alias VivaTensor.CLI.{Ops, Peers, Quality}
  alias VivaTensor.Native

  @shape [1024, 1024]

  # Of each kind of row the first that a reference program has a figure for.
  defp some(bars) do
    %{
      "sqnr" => Enum.filter(bars["sqnr"], &(&1["format"] == "nf4")),
      "mean_error" => Enum.take(bars["mean_error"], 1),
      "ggml_error" => Enum.take(bars["ggml_error"], 1)
    }
  end

  defp fails_with_2(argv) do
    capture_io(:stderr, fn -> assert catch_exit(Bench.run(argv)) == {:shutdown, 2} end)
  end

  test "names what is wrong with a command" do
    assert fails_with_2([]) =~ "which subcommand? There are ops, peers, quality"
    assert fails_with_2(["speed"]) =~ ~s(no subcommand "speed"; there are ops, peers, quality)
    assert fails_with_2(["quality", "int8"]) =~ ~s(what is "int8"?)
    assert fails_with_2(["quality", "--jsn"]) =~ "did you mean --json?"
    assert capture_io(fn -> Bench.run(["--help"]) end) =~ "mix viva.bench quality"
  end

  test "prints figures beside bars and references" do
    bars = some(Quality.bars())
    {code, text} = with_io(fn -> Quality.run([], bars, @shape) end)
    assert code == 0
    assert text =~ ~r/nf4 +4\.5000 +4\.500 +20\.7\d +20\.72 +20\.73 +bitsandbytes [\d.]+ +ok/
    assert text =~ ~r/nf4 +block_size 32 +0\.067\d+ +0\.067746 +0\.067\d+ +bitsandbytes/
    assert text =~ ~r/q8_0 +method rtn +0\.00007\d+ +0\.0020000 +0\.00007\d+ +libgguf/
    assert text =~ "6 rows, every bar is reached"
  end

  test "exits with 1 for a bar that is missed, of each kind" do
    for {kind, key, bar} <- [
          {"sqnr", "sqnr_db", 60.0},
          {"sqnr", "bits_per_weight", 4.0},
          {"mean_error", "mean_error", 0.05},
          {"ggml_error", "error", 1.0e-9}
        ] do
      bars =
        Map.update!(some(Quality.bars()), kind, fn [first | _] -> [%{first | key => bar}] end)

      {code, json} = with_io(fn -> Quality.run([json: true], bars, @shape) end)
      assert code == 1
      {:ok, result} = Native.json_decode(json)
      assert result["missed"] >= 1
      refute Enum.all?(result["rows"], & &1["met"])
    end
  end

  test "prints the rates of every format" do
    {code, text} = with_io(fn -> Ops.run([], [256, 256], 1) end)
    assert code == 0

    for %{name: format} <- VivaTensor.formats() do
      assert text =~ ~r/^#{format} +\d+\.\d{3}( +\d+\.\d\d){5}(( +\d+\.\d\d){3})?$/m
    end
  end

  test "has the rates as JSON too" do
    {code, json} = with_io(fn -> Ops.run([json: true], [256, 256], 1) end)
    assert code == 0
    assert {:ok, %{"shape" => [256, 256], "rows" => rows}} = Native.json_decode(json)
    assert length(rows) == length(VivaTensor.formats())

    for row <- rows do
      packed = Map.values(row["packed"] || %{})
      rates = [row["quantize"], row["dequantize"] | Map.values(row["matmul"]) ++ packed]
      assert Enum.all?(rates, &(&1 > 0)), row["format"]
      # Floats and tables of 256 values are no integers.
      assert packed == [] == (row["format"] =~ ~r/fp8|dynamic8|sparse24/)
    end
  end

  test "runs the peers where there is a Python, and says so where there is none" do
    flags = [venv: "peers", threads: 2]
    # IO of a command goes to the device of the process that started it.
    {code, said} = with_io(fn -> Peers.run(flags, System.find_executable("echo")) end)
    assert {code, said =~ ~r"bench/peers/ops.py --venv peers --threads 2\n"} == {0, true}
    assert capture_io(fn -> assert Peers.run([], System.find_executable("false")) == 1 end) == ""
    assert capture_io(:stderr, fn -> assert Peers.run([], nil) == 1 end) =~ "install it"
  end

  test "every figure of a reference program belongs to a bar" do
    bars = Quality.bars()

    {:ok, references} =
      "bench/results/reference_quality.json" |> File.read!() |> Native.json_decode()

    sqnr = for bar <- bars["sqnr"], do: {bar["format"], bar["options"]}
    mean_error = for bar <- bars["mean_error"], do: {bar["format"], bar["options"]}

    ggml_error =
      for bar <- bars["ggml_error"], do: {bar["format"], Map.put(bar["options"], "method", "rtn")}

    for {name, known} <- [sqnr_db: sqnr, mean_error: mean_error, ggml_error: ggml_error],
        row <- references[to_string(name)] do
      assert {row["format"], row["options"]} in known
      assert row["program"] =~ ~r/^\S+ \d/
    end
  end

  # The README's rows are some of those of one run.
  test "the README's figures of speed are those of bench/results/ops.json" do
    {:ok, %{"rows" => rows}} = "bench/results/ops.json" |> File.read!() |> Native.json_decode()
    [_, section] = "README.md" |> File.read!() |> String.split("## Speed\n")
    [section, _] = String.split(section, "\n## ", parts: 2)
    shown = Regex.scan(~r/^\| ([^|]*\d[^|]*) \| .*\|$/m, section)
    assert length(shown) >= 8

    for [line, name] <- shown do
      row = Enum.find(rows, &(&1["operation"] == name and &1["threads"] == 1))
      assert row, "no row #{inspect(name)} in ops.json"
      assert line == speed(row)
    end
  end

  defp speed(row) do
    figure = row["ours"]["figure"]
    figure = rounded(figure, if(figure < 100, do: 1, else: 0))
    {limit, peer} = {rounded(row["of_limit"], 2), rounded(row["of_best_peer"], 1)}

    "| #{row["operation"]} | #{figure} #{row["unit"]} | #{limit} | #{peer} × #{row["best_peer"]} |"
  end

  defp rounded(value, decimals), do: :erlang.float_to_binary(value * 1.0, decimals: decimals)
end

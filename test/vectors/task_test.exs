defmodule VivaTensor.Vectors.TaskTest do
  # The tasks write to standard output and standard error.
  use ExUnit.Case, async: false

  alias Mix.Tasks.Viva
  alias VivaTensor.{Job, Native, Test}
  alias VivaTensor.CLI.Progress
  alias VivaTensor.Test.Directory
  alias VivaTensor.Test.Vectors, as: Made

  doctest VivaTensor.CLI.Vectors

  @model "examples/models/viva-tiny"

  setup do
    {:ok, dir: Directory.create!()}
  end

  defp task(argv), do: Test.Task.run(Viva.Vectors, argv)

  test "compresses and says what is found", %{dir: dir} do
    to = Path.join(dir, "words")
    argv = [@model, "--to", to, "--codes", "binary", "--tensor", "model.embed_tokens.weight"]
    assert {0, stdout, _} = task(argv ++ ["--queries", "50", "--memory-limit", "64MB"])
    assert stdout =~ "#{@model} -> #{to}: binary codes, scored again by int8, cosine"
    assert stdout =~ ~r/recall@10  0\.\d{4} by codes, 0\.\d{4} with 100 scored again/
    assert stdout =~ ~r/with binary queries 0\.\d{4} by codes/
    assert stdout =~ "50 queries"
    assert {4, "", stderr} = task(argv)
    assert stderr =~ "exists"

    assert {0, json, _} = task(argv ++ ["--force", "--json", "--no-center", "--codes", "int8"])
    assert {:ok, %{"vectors" => 1024, "recipe" => recipe}} = Native.json_decode(json)
    assert %{"codes" => "int8", "center" => false, "rescore" => "f16"} = recipe

    assert {0, stdout, ""} = Test.Task.run(Viva.Jobs, ["report", to])
    assert stdout =~ "vectors    1024"
  end

  test "an unfinished one is listed and gone on with", %{dir: dir} do
    vectors = Made.clustered(64, 16)
    source = Made.npy!(Path.join(dir, "a.npy"), vectors, 16)
    to = Path.join(dir, "out")
    # Killed after its only piece, before its output appears.
    test = self()

    Test.Jobs.at_unit_start(fn unit ->
      send(test, {:at, unit.job})
      receive do: (:go -> :ok)
    end)

    {:ok, job} = Job.start(vectors: source, to: to, codes: :int4)
    assert_receive {:at, ^job}
    {:ok, %{running: ["vectors 0 to 63"]}} = Job.status(job)
    {:error, _} = Job.cancel(job)
    # Nothing was recorded yet.
    assert {3, "", stderr} =
             Test.Task.run(Viva.Vectors, [Path.join(dir, "b.npy"), "--to", to, "--codes", "int4"])

    assert stderr =~ "o such file"
    assert {4, _, stderr} = Test.Task.run(Viva.Jobs, ["resume", to])
    assert stderr =~ "no job left anything"
  end

  test "refuses what makes no sense", %{dir: dir} do
    to = Path.join(dir, "out")

    for {argv, message} <- [
          {["a.npy", "--to", to], "--codes is missing"},
          {["a.npy", "--to", to, "--codes", "itn8"], "not itn8; did you mean int8?"},
          {["a.npy", "--to", to, "--codes", "int8", "--rescore", "f8"],
           "--rescore is f16, int8 or none"},
          {["a.npy", "--to", to, "--codes", "int8", "--metric", "cosin"], "did you mean cosine?"},
          {["a.npy", "--to", to, "--codes", "int8", "--nodes", "a@h"], "unknown flag --nodes"},
          {["a.npy", "--to", to, "--code", "int8"], "did you mean --codes?"},
          {["a.npy", "--codes", "int8"], "--to DIR is missing"},
          {["--codes", "int8"], "which SOURCE?"}
        ] do
      assert {2, "", stderr} = task(argv)
      assert stderr =~ message
    end

    assert {2, "", stderr} = task([@model, "--to", to, "--codes", "int8", "--queries", "-1"])
    assert stderr =~ "queries"
    assert {3, "", stderr} = task([@model, "--to", to, "--codes", "int8"])
    assert stderr =~ "matrices of floats"
    assert {3, "", stderr} = task([@model, "--to", to, "--codes", "int8", "--tensor", "nope"])
    assert stderr =~ "no tensor named"
    refute File.exists?(to)
  end

  test "progress tells of vectors, which a stream does not count beforehand" do
    status = %{state: :running, bytes_done: 4000, bytes_per_second: 1.0e9, eta_seconds: nil}
    line = &Progress.line(Map.merge(status, &1))

    assert line.(%{vectors: %{done: 5, of: 20}, bytes: 16_000}) ==
             "5 of 20 vectors  4.0 kB of 16.0 kB  1.00 GB/s"

    assert line.(%{vectors: %{done: 5, of: nil}, bytes: 0}) == "5 vectors  4.0 kB  1.00 GB/s"
  end

  test "has a page of help" do
    assert {0, stdout, _} = task(["--help"])
    assert stdout =~ "mix viva.vectors SOURCE --to DIR --codes int8"
  end
end

defmodule VivaTensor.Vectors.CodesTest do
  # What a job makes of vectors, and what is found in it.
  use ExUnit.Case, async: true

  alias VivaTensor.{Checkpoint, Tensor, Vectors}
  alias VivaTensor.Test.{Directory, Jobs, Safetensors}
  alias VivaTensor.Test.Vectors, as: Made

  doctest VivaTensor.Vectors
  doctest VivaTensor.Vectors.Recipe

  setup do
    {:ok, dir: Directory.create!()}
  end

  test "an embedding matrix as codes of every kind", %{dir: dir} do
    {words, dimension} = Made.words()
    source = Made.npy!(Path.join(dir, "words.npy"), words, dimension)

    for {codes, smaller, alone, rescored} <- [
          {:int8, 3.5, 0.85, 0.9},
          {:int4, 6.5, 0.7, 0.85},
          {:binary, 25, 0.4, 0.75}
        ] do
      to = Path.join(dir, "#{codes}")
      assert {:ok, report} = Jobs.run(vectors: source, to: to, codes: codes)
      assert report.vectors == length(words)
      assert {report.dimension, report.dtype} == {dimension, :f32}
      assert report.input_bytes == length(words) * dimension * 4
      assert report.ratio > smaller
      assert report.recall.codes > alone, inspect(report.recall)
      assert report.recall.rescored > rescored, inspect(report.recall)
      assert report.recall.rescored > report.recall.codes
      assert report.recall.hamming == nil == (codes != :binary)

      {:ok, json} =
        to |> Path.join("report.json") |> File.read!() |> VivaTensor.Native.json_decode()

      assert json["recall"]["rescored"] == report.recall.rescored
      assert Vectors.Report.from_map(json, report.recipe) == report
      assert Vectors.Report.table(report) =~ "recall@10"

      for file <- report.files do
        assert File.stat!(Path.join(to, file.name)).size == file.bytes
      end

      set = Vectors.open!(to)
      assert {set.count, set.codes} == {length(words), codes}
      assert {:ok, [{17, score} | rest]} = Vectors.search(set, Enum.at(words, 17), k: 4)
      assert_in_delta score, 1.0, 0.01
      assert length(rest) == 3
    end
  end

  test "a stream, a file of one matrix and one of several become the same bytes", %{dir: dir} do
    vectors = Made.clustered(300, 24)
    bytes = IO.iodata_to_binary(vectors)
    two = Path.join(dir, "two.safetensors")
    other = {"a", "F32", [2, 24], Safetensors.normal(48, 5)}
    Safetensors.write!(two, [other, {"b", "F32", [300, 24], bytes}])

    sources = [
      [vectors: Stream.map(vectors, & &1)],
      [vectors: vectors, dimension: 24, dtype: :f32],
      [vectors: Made.npy!(Path.join(dir, "a.npy"), vectors, 24)],
      [vectors: Made.safetensors!(Path.join(dir, "a.safetensors"), vectors, 24)],
      [vectors: two, tensor: "b"]
    ]

    for codes <- [:int8, :int4, :binary] do
      [first | others] =
        for {source, i} <- Enum.with_index(sources) do
          to = Path.join(dir, "#{codes}-#{i}")
          assert {:ok, report} = Jobs.run([to: to, codes: codes] ++ source)
          {Jobs.digests(to), report.recall}
        end

      assert Enum.uniq(others) == [first]
    end
  end

  test "the output is a set of tensors that any reader opens", %{dir: dir} do
    vectors = Made.clustered(50, 20)
    to = Path.join(dir, "out")
    assert {:ok, _} = Jobs.run(vectors: vectors, to: to, codes: :binary)
    checkpoint = Checkpoint.open!(to)
    codes = Checkpoint.get!(checkpoint, "codes")
    assert {codes.dtype, codes.shape} == {:u8, [50, 3]}
    assert Checkpoint.get!(checkpoint, "rescore").shape == [50, 20]
    assert Checkpoint.get!(checkpoint, "rescore_scale").shape == [50]
    mean = checkpoint |> Checkpoint.get!("mean") |> Tensor.to_list!()

    # As numpy.packbits has them: the first in the highest bit.
    for {vector, bits} <- Enum.zip(vectors, codes |> Tensor.to_binary!() |> rows(3)) do
      x = Made.floats(vector)
      length = x |> Enum.map(&(&1 * &1)) |> Enum.sum() |> :math.sqrt()
      <<signs::bitstring-size(20), 0::4>> = bits

      for {x, mean, bit} <- Enum.zip([x, mean, for(<<b::1 <- signs>>, do: b)]),
          abs(x / length - mean) > 1.0e-6 do
        assert bit == if(x / length > mean, do: 1, else: 0)
      end
    end
  end

  defp rows(binary, size),
    do: for(at <- 0..(byte_size(binary) - size)//size, do: binary_part(binary, at, size))

  test "searches for one and for several, by codes alone and by binary queries", %{dir: dir} do
    vectors = Made.clustered(400, 64)
    to = Path.join(dir, "out")
    assert {:ok, _} = Jobs.run(vectors: vectors, to: to, codes: :binary, rescore: :f16)
    set = Vectors.open!(to)
    query = Enum.at(vectors, 9)
    matrix = Tensor.from_binary!(query <> Enum.at(vectors, 10), :f32, [2, 64])

    assert {:ok, [one, [{10, _} | _]]} = Vectors.search(set, matrix)
    assert Vectors.search!(set, query) == one
    assert Vectors.search!(set, Tensor.from_binary!(query, :f32, [64])) == one
    assert [{9, _} | _] = Vectors.search!(set, query, k: 3, oversample: 0)
    assert [{9, +0.0} | _] = Vectors.search!(set, query, oversample: 0, hamming: true)

    for {opts, message} <- [
          {[k: 0], "option k: expected a positive integer, got 0"},
          {[oversample: -1], "option oversample: expected an integer from 0 on, got -1"},
          {[hamming: 1], "option hamming: expected true or false, got 1"},
          {[n: 3], "option n: no such option; it takes k, oversample, hamming"}
        ] do
      assert {:error, %{message: ^message}} = Vectors.search(set, query, opts)
    end

    assert {:error, %{reason: {:size_mismatch, _}}} = Vectors.search(set, query <> query)
    assert {:error, %{reason: {:invalid_option, _}}} = Vectors.search(set, [1.0])
    assert :ok = Vectors.release(set)
    assert {:error, %{reason: {:released, _}}} = Vectors.search(set, query)
    assert {:error, %{reason: {:io, _}}} = Vectors.open(Path.join(dir, "none"))
    assert {:error, %{reason: {:invalid_file, _}}} = Vectors.open("examples/models/viva-tiny")
  end

  test "without queries nothing is measured", %{dir: dir} do
    vectors = Made.clustered(30, 8)

    opts = [
      vectors: vectors,
      codes: :int8,
      rescore: :none,
      metric: :dot,
      center: false,
      queries: 0
    ]

    to = Path.join(dir, "out")
    assert {:ok, %{recall: nil} = report} = Jobs.run([to: to] ++ opts)
    assert Vectors.Report.table(report) =~ "not measured"

    assert to |> File.ls!() |> Enum.sort() ==
             ~w(codes.safetensors report.html report.json scale.safetensors) ++
               ["vectors.safetensors.index.json"]
  end
end

defmodule VivaTensor.Vectors.Report do
  @moduledoc """
  What a job made of vectors: how small they became, and how many of the nearest a search
  in them still finds.
  """

  alias VivaTensor.{Size, Table}
  alias VivaTensor.Vectors.Recipe

  @enforce_keys [:source, :target, :recipe, :vectors, :dimension, :dtype, :files, :input_bytes]
  defstruct [
    :source,
    :target,
    :recipe,
    :vectors,
    :dimension,
    :dtype,
    :files,
    :input_bytes,
    :output_bytes,
    :codes_bytes,
    :ratio,
    :recall,
    :seconds,
    :bytes_per_second,
    :versions,
    :identity,
    quarantined: []
  ]

  @typedoc """
  How many of the ten nearest vectors, by exact scores of the source's own values,
  searches find, from 0 to 1. `queries` vectors of the set look for all others but
  themselves: drawn from all of a file, and from the first piece of a stream.

  - `codes` - by codes alone
  - `rescored` - when the `candidates` best of these are scored again; `nil` where nothing
    to score by was written
  - `hamming`, `hamming_rescored` - the same where the query is binary too, which is what
    databases do; `nil` but for binary codes
  """
  @type recall :: %{
          queries: pos_integer,
          nearest: pos_integer,
          candidates: pos_integer,
          codes: float,
          rescored: float | nil,
          hamming: float | nil,
          hamming_rescored: float | nil
        }

  @typedoc """
  `input_bytes` are those of the vectors, `output_bytes` those of all files, `codes_bytes`
  of those that a search looks at first: codes, scales and mean. `ratio` is the first over
  the last. `recall` is `nil` where no queries were asked for, or there is but one vector.
  `quarantined` is always empty: a vector that cannot be encoded ends the job.
  """
  @type t :: %__MODULE__{
          source: Path.t() | nil,
          target: Path.t(),
          recipe: Recipe.t(),
          vectors: non_neg_integer,
          dimension: pos_integer,
          dtype: atom,
          files: [%{name: String.t(), bytes: non_neg_integer}],
          input_bytes: non_neg_integer,
          output_bytes: non_neg_integer,
          codes_bytes: non_neg_integer,
          ratio: float,
          recall: recall | nil,
          seconds: float,
          bytes_per_second: float,
          versions: %{atom => String.t()},
          identity: String.t() | nil,
          quarantined: []
        }

  @codes ["codes.safetensors", "scale.safetensors", "mean.safetensors"]

  @doc false
  # Adds the totals to what a job collected.
  @spec new(map) :: t
  def new(collected) do
    report = struct!(__MODULE__, collected)
    codes_bytes = report.files |> Enum.filter(&(&1.name in @codes)) |> bytes()

    %{
      report
      | output_bytes: bytes(report.files),
        codes_bytes: codes_bytes,
        ratio: report.input_bytes / max(codes_bytes, 1),
        bytes_per_second: report.input_bytes / max(report.seconds, 1.0e-6),
        versions: VivaTensor.Report.versions()
    }
  end

  defp bytes(files), do: files |> Enum.map(& &1.bytes) |> Enum.sum()

  @doc "A report as plain data: what `report.json` holds."
  @spec to_map(t) :: map
  def to_map(%__MODULE__{} = report) do
    report |> Map.from_struct() |> Map.update!(:recipe, &Recipe.to_map/1)
  end

  @doc false
  # The report of a recipe, from what `report.json` holds.
  @spec from_map(%{String.t() => term}, Recipe.t()) :: t
  def from_map(map, recipe) do
    fields = keys(map)

    struct!(__MODULE__, %{
      fields
      | recipe: recipe,
        dtype: String.to_existing_atom(fields.dtype),
        files: Enum.map(fields.files, &keys/1),
        recall: fields.recall && keys(fields.recall),
        versions: keys(fields.versions)
    })
  end

  defp keys(map), do: Map.new(map, fn {key, value} -> {String.to_existing_atom(key), value} end)

  @doc "A report for people."
  @spec table(t) :: String.t()
  def table(%__MODULE__{} = report) do
    files = for file <- report.files, do: [Path.rootname(file.name), Size.format(file.bytes)]

    IO.iodata_to_binary([
      "#{report.source || "a stream"} -> #{report.target}: #{describe(report)}\n\n",
      Table.text([{"tensor", :left}, {"bytes", :right}], files),
      "\n",
      "vectors    #{report.vectors} of #{report.dimension} #{report.dtype}, " <>
        "#{Size.format(report.input_bytes)}\n",
      "codes      #{Size.format(report.codes_bytes)} " <>
        "(#{decimals(report.ratio, 2)}x smaller), with what is scored again " <>
        "#{Size.format(report.output_bytes)}\n",
      recall(report.recall),
      "time       #{decimals(report.seconds, 2)} s, " <>
        "#{decimals(report.bytes_per_second / 1.0e9, 2)} GB/s\n"
    ])
  end

  defp describe(%{recipe: recipe}) do
    rescore = if recipe.rescore != :none, do: ", scored again by #{recipe.rescore}", else: ""
    "#{recipe.codes} codes#{rescore}, #{recipe.metric}"
  end

  defp recall(nil), do: "recall     not measured\n"

  defp recall(recall) do
    [
      "recall@#{recall.nearest}  #{found(recall, :codes, :rescored)}",
      if(recall.hamming,
        do: "\n           with binary queries #{found(recall, :hamming, :hamming_rescored)}",
        else: ""
      ),
      "; #{recall.queries} queries\n"
    ]
  end

  defp found(recall, codes, rescored) do
    again =
      if recall[rescored],
        do: ", #{decimals(recall[rescored], 4)} with #{recall.candidates} scored again",
        else: ""

    "#{decimals(recall[codes], 4)} by codes#{again}"
  end

  defp decimals(number, decimals), do: :erlang.float_to_binary(number / 1, decimals: decimals)
end

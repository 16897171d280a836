defmodule VivaTensor.Report do
  @moduledoc """
  What a job did: how small the checkpoint became, how good it still is, and what
  happened to every tensor.

  Sizes are counted from the files. `bits_per_weight` is over the quantized
  tensors, with scales, zero points and the fixed tables of the layout.
  """

  alias VivaTensor.{Conversion, Recipe, Size, Table}

  @enforce_keys [:source, :target, :recipe, :tensors, :files, :input_bytes, :seconds]
  defstruct [
    :source,
    :target,
    :recipe,
    :tensors,
    :files,
    :input_bytes,
    :seconds,
    :output_bytes,
    :quantized,
    :kept,
    :lossless,
    :ratio,
    :bits_per_weight,
    :sqnr_db,
    :worst,
    :bytes_per_second,
    :versions,
    :statistics,
    :identity,
    quarantined: []
  ]

  @typedoc """
  One tensor. `format` is what it was quantized to; `reason` says why it was kept,
  has another format than the recipe's, or goes without the scales of its method, and
  that a kept one was divided by the scales of the layers after it; what comes after `elements` belongs to
  quantized tensors. A figure that no number can tell is `nil`: `sqnr_db` where
  there is no error, `cosine` where all is zero. `output_error` is that of the layer's
  output, ‖X·Wᵀ − X·Ŵᵀ‖ / ‖X·Wᵀ‖, on rows that a method looked at.

  In the report of a conversion `dtype` is the format that a tensor had, `from` the
  layout of a quantized one, `format` what it became; `lossless` says whether it has
  the same values, and `changed` how many have not.

  `worker`, `began`, `ended` and `attempt` are the span of the unit in the time line of the
  job, in seconds since it began. What an earlier job had done is `verified`, and has the
  times of being looked at by the one that goes on with it. Of a huge tensor, which units do
  a range of rows at a time, `ranges` are the spans of these, each with its `rows`: the first
  one, and the one after its last.
  """
  @type row :: %{
          required(:name) => String.t(),
          required(:shape) => [non_neg_integer],
          required(:dtype) => String.t(),
          required(:action) => :quantize | :convert | :keep | :encode,
          required(:format) => atom,
          required(:reason) => String.t() | nil,
          required(:input_bytes) => non_neg_integer,
          required(:output_bytes) => non_neg_integer,
          required(:elements) => non_neg_integer,
          optional(:from) => atom,
          optional(:quantized) => boolean,
          optional(:lossless) => boolean,
          optional(:changed) => non_neg_integer,
          optional(:bits_per_weight) => float,
          optional(:mse) => float | nil,
          optional(:sqnr_db) => float | nil,
          optional(:mean_error) => float | nil,
          optional(:max_error) => float | nil,
          optional(:psnr_db) => float | nil,
          optional(:cosine) => float | nil,
          optional(:output_error) => float | nil,
          optional(:worker) => non_neg_integer,
          optional(:began) => float,
          optional(:ended) => float,
          optional(:attempt) => pos_integer,
          optional(:verified) => boolean,
          optional(:ranges) => [map]
        }

  @typedoc "A tensor that was put aside, and why the last attempt failed."
  @type quarantined :: %{name: String.t(), reason: String.t(), attempts: pos_integer}

  @typedoc """
  `identity` is a hash of the source, the recipe and the version of the program: where it
  is the same, so is the output.

  `quarantined` tensors make a job partial: its output is then not there, `files` are
  empty and `output_bytes` those of the tensors that are done.

  `input_bytes` and `output_bytes` are those of the weight files on disk, `ratio`
  the first over the second, `sqnr_db` that of all quantized weights together, and
  `worst` the quantized tensor with the lowest one. `quantized` are tensors of the
  output; `lossless`, of a conversion, those that were converted and have the same
  values, whose others alone count for `sqnr_db` and `worst`.
  """
  @type t :: %__MODULE__{
          source: Path.t(),
          target: Path.t(),
          recipe: Recipe.t() | Conversion.t(),
          tensors: [row],
          identity: String.t() | nil,
          quarantined: [quarantined],
          files: [%{name: String.t(), bytes: non_neg_integer}],
          input_bytes: non_neg_integer,
          output_bytes: non_neg_integer,
          quantized: non_neg_integer,
          kept: non_neg_integer,
          lossless: non_neg_integer | nil,
          ratio: float,
          bits_per_weight: float | nil,
          sqnr_db: float | nil,
          worst: %{name: String.t(), sqnr_db: float} | nil,
          seconds: float,
          bytes_per_second: float,
          versions: %{atom => String.t()},
          statistics: %{file: Path.t() | nil, layers: pos_integer, tokens: non_neg_integer} | nil
        }

  @doc false
  # Adds the totals to what a job collected.
  @spec new(map) :: t
  def new(collected) do
    report = struct!(__MODULE__, collected)
    quantized = Enum.filter(report.tensors, &(&1.action == :quantize or &1[:quantized] == true))
    measured = Enum.filter(report.tensors, &(&1.action != :keep))

    output_bytes =
      if report.files == [],
        do: sum(report.tensors, :output_bytes),
        else: sum(report.files, :bytes)

    %{
      report
      | output_bytes: output_bytes,
        quantized: length(quantized),
        kept: length(report.tensors) - length(quantized),
        lossless: lossless(report),
        ratio: report.input_bytes / max(output_bytes, 1),
        bits_per_weight: bits_per_weight(quantized),
        sqnr_db: sqnr_db(measured),
        worst: worst(measured),
        bytes_per_second: sum(report.tensors, :input_bytes) / max(report.seconds, 1.0e-6),
        versions: versions()
    }
  end

  @doc false
  # The row of a unit, from what its work returned. Bits per weight are counted from
  # the bytes in the file.
  @spec row(map, map) :: row
  def row(unit, stats) do
    stats =
      Map.new(stats, fn {key, value} ->
        {key, if(is_number(value) or is_boolean(value), do: value)}
      end)

    row = Map.merge(stats, Map.take(unit, [:name, :shape, :dtype, :action, :format, :reason]))

    case row.action do
      :keep -> Map.drop(row, [:lossless, :changed])
      :quantize -> with_bits(row)
      :convert -> row |> Map.merge(Map.take(unit, [:from, :quantized])) |> with_bits()
    end
  end

  defp with_bits(row), do: Map.put(row, :bits_per_weight, bits_per_weight([row]))

  @doc "A report as plain data: what `report.json` holds."
  @spec to_map(t) :: map
  def to_map(%__MODULE__{} = report) do
    report |> Map.from_struct() |> Map.update!(:recipe, fn %kind{} = r -> kind.to_map(r) end)
  end

  @doc false
  # The report of a recipe or conversion, from what `report.json` holds.
  @spec from_map(%{String.t() => term}, Recipe.t() | Conversion.t()) :: t
  def from_map(map, recipe) do
    report = map |> keys() |> Map.put(:recipe, recipe)

    struct!(__MODULE__, %{
      report
      | tensors: Enum.map(report.tensors, &row_from_map/1),
        files: Enum.map(report.files, &keys/1),
        quarantined: Enum.map(report.quarantined, &keys/1),
        worst: report.worst && keys(report.worst),
        statistics: report.statistics && keys(report.statistics),
        versions: keys(report.versions)
    })
  end

  defp row_from_map(map) do
    row = map |> keys() |> ranges_from_map()

    for key <- [:action, :format, :from], value = row[key], reduce: row do
      row -> Map.put(row, key, String.to_existing_atom(value))
    end
  end

  defp ranges_from_map(%{ranges: ranges} = row), do: %{row | ranges: Enum.map(ranges, &keys/1)}
  defp ranges_from_map(row), do: row

  defp keys(map), do: Map.new(map, fn {key, value} -> {String.to_existing_atom(key), value} end)

  @doc """
  A report as a text table. Layers of the same kind share a row, whose SQNR is the
  lowest of them; `tensors: true` gives each tensor a row of its own.
  """
  @spec table(t, keyword) :: String.t()
  def table(%__MODULE__{} = report, opts \\ []) do
    columns = [
      {"tensor", :left},
      {"n", :right},
      {"dtype", :left},
      {"shape", :left},
      {"stored as", :left},
      {"before", :right},
      {"after", :right},
      {"bits/w", :right},
      {"SQNR dB", :right}
    ]

    rows =
      report.tensors
      |> groups(Keyword.get(opts, :tensors, false))
      |> Enum.map(&table_row/1)

    IO.iodata_to_binary([
      "#{report.source} -> #{report.target}: #{describe(report.recipe)}\n\n",
      Table.text(columns, rows),
      "\n",
      summary(report)
    ])
  end

  defp summary(%{recipe: %Conversion{}} = report) do
    lossy = Enum.count(report.tensors, &(&1.action == :convert)) - report.lossless

    [
      sizes(report),
      "lossless   #{report.lossless} tensors\n",
      if lossy > 0 do
        [
          "changed    #{lossy} tensors",
          if(report.sqnr_db, do: ", SQNR #{decimals(report.sqnr_db, 2)} dB", else: ""),
          lowest(report.worst),
          "\n"
        ]
      else
        []
      end,
      "kept       #{Enum.count(report.tensors, &(&1.action == :keep))} tensors\n",
      put_aside(report.quarantined),
      time(report)
    ]
  end

  defp summary(report) do
    [
      sizes(report),
      if report.quantized > 0 do
        [
          "quantized  #{report.quantized} tensors, #{decimals(report.bits_per_weight, 3)} bits per weight",
          if(report.sqnr_db, do: ", SQNR #{decimals(report.sqnr_db, 2)} dB", else: ", no error"),
          lowest(report.worst),
          "\n"
        ]
      else
        "quantized  nothing\n"
      end,
      "kept       #{report.kept} tensors\n",
      seen(report.statistics),
      put_aside(report.quarantined),
      time(report)
    ]
  end

  defp put_aside([]), do: ""

  defp put_aside(quarantined) do
    [
      "PARTIAL    #{length(quarantined)} tensors could not be done; nothing was published\n",
      for(q <- quarantined, do: "  #{q.name}: #{q.reason} (#{q.attempts} attempts)\n")
    ]
  end

  defp seen(nil), do: ""

  defp seen(seen) do
    "statistics #{seen.file || "in memory"}: #{seen.layers} layers, #{seen.tokens} rows each\n"
  end

  defp sizes(report) do
    {ratio, word} =
      if report.ratio >= 1, do: {report.ratio, "smaller"}, else: {1 / report.ratio, "larger"}

    "on disk    #{Size.format(report.input_bytes)} -> #{Size.format(report.output_bytes)}" <>
      " (#{decimals(ratio, 2)}x #{word})\n"
  end

  defp time(report) do
    "time       #{decimals(report.seconds, 2)} s, #{decimals(report.bytes_per_second / 1.0e9, 2)} GB/s\n"
  end

  defp lowest(nil), do: ""
  defp lowest(worst), do: " (lowest #{decimals(worst.sqnr_db, 2)} dB, #{worst.name})"

  @doc """
  A recipe in a few words: the format, its layout, and the settings that matter most
  or were asked for.
  """
  @spec describe(Recipe.t() | Conversion.t()) :: String.t()
  def describe(%Conversion{} = conversion) do
    floats = if conversion.dtype, do: ", floats in #{conversion.dtype}", else: ""
    "to #{conversion.layout} layout#{floats}"
  end

  def describe(%Recipe{} = recipe) do
    keys = Enum.uniq([:block_size, :method] ++ Keyword.keys(recipe.options))

    settings =
      for key <- keys, value = recipe.settings[key] do
        if value == true, do: to_string(key), else: "#{key} #{value}"
      end

    Enum.join(["#{recipe.format} in #{recipe.layout} layout" | settings], ", ")
  end

  # Rows of the table

  defp groups(rows, true), do: Enum.map(rows, &{&1.name, [&1]})

  defp groups(rows, false) do
    grouped = Enum.group_by(rows, &group_key/1)

    for key <- rows |> Enum.map(&group_key/1) |> Enum.uniq() do
      {elem(key, 0), Map.fetch!(grouped, key)}
    end
  end

  defp group_key(row) do
    {kind(row.name), row.dtype, row.shape, row.action, row[:format], row.reason, row[:lossless]}
  end

  defp table_row({name, [row | _] = rows}) do
    done? = row.action != :keep
    lowest = if done?, do: worst(rows)

    [
      name,
      length(rows),
      if(row[:from], do: "#{row.from} #{row.dtype}", else: row.dtype),
      Enum.join(row.shape, "x"),
      stored_as(row),
      rows |> sum(:input_bytes) |> Size.format(),
      rows |> sum(:output_bytes) |> Size.format(),
      if(done?, do: rows |> bits_per_weight() |> decimals(3)),
      cond do
        lowest -> decimals(lowest.sqnr_db, 2)
        row[:lossless] -> "lossless"
        true -> nil
      end
    ]
  end

  defp stored_as(%{action: :keep, reason: reason}), do: "kept: #{reason}"
  defp stored_as(%{format: format, reason: nil}), do: format
  defp stored_as(%{format: format, reason: reason}), do: "#{format}: #{reason}"

  @doc """
  What a tensor is called in every layer.

      iex> VivaTensor.Report.kind("model.layers.11.mlp.up_proj.weight")
      "model.layers.*.mlp.up_proj.weight"
  """
  @spec kind(String.t()) :: String.t()
  def kind(name), do: Regex.replace(~r/(?<=^|\.)\d+(?=\.|$)/, name, "*")

  @doc """
  The layer of a tensor: its name up to the first number, or else all but the last part.

      iex> for name <- ["model.layers.11.mlp.up_proj.weight", "model.norm.weight", "bias"] do
      ...>   VivaTensor.Report.layer(name)
      ...> end
      ["model.layers.11", "model.norm", "bias"]
  """
  @spec layer(String.t()) :: String.t()
  def layer(name) do
    parts = String.split(name, ".")

    case Enum.find_index(parts, &number?/1) do
      nil when length(parts) == 1 -> name
      nil -> parts |> Enum.drop(-1) |> Enum.join(".")
      index -> parts |> Enum.take(index + 1) |> Enum.join(".")
    end
  end

  defp number?(""), do: false
  defp number?(part), do: for(<<c <- part>>, c not in ?0..?9, do: c) == []

  # Totals

  defp lossless(%{recipe: %Conversion{}, tensors: rows}),
    do: Enum.count(rows, &(&1[:lossless] == true))

  defp lossless(_report), do: nil

  defp sum(rows, key), do: rows |> Enum.map(&Map.fetch!(&1, key)) |> Enum.sum()

  defp bits_per_weight([]), do: nil

  defp bits_per_weight(rows) do
    sum(rows, :output_bytes) * 8 / max(sum(rows, :elements), 1)
  end

  defp worst(rows) do
    rows
    |> Enum.filter(&is_number(&1[:sqnr_db]))
    |> Enum.min_by(& &1.sqnr_db, fn -> nil end)
    |> case do
      nil -> nil
      row -> Map.take(row, [:name, :sqnr_db])
    end
  end

  @doc false
  # SQNR of all weights together: the energies of signals and errors add up. A
  # tensor without error adds no noise, and no figure tells its energy.
  def sqnr_db(rows) do
    rows = Enum.filter(rows, &(is_number(&1[:sqnr_db]) and &1.mse > 0))
    noise = rows |> Enum.map(&(&1.mse * &1.elements)) |> Enum.sum()

    signal =
      rows
      |> Enum.map(&(&1.mse * &1.elements * :math.pow(10, &1.sqnr_db / 10)))
      |> Enum.sum()

    if noise > 0 and signal > 0, do: 10 * :math.log10(signal / noise)
  end

  @doc "What the job ran on."
  @spec versions() :: %{atom => String.t()}
  def versions do
    %{
      viva_tensor: to_string(Application.spec(:viva_tensor, :vsn)),
      elixir: System.version(),
      otp: System.otp_release()
    }
  end

  defp decimals(number, decimals), do: :erlang.float_to_binary(number / 1, decimals: decimals)
end

defmodule VivaTensor.Compare do
  @moduledoc """
  Formats and methods side by side, on one tensor or a whole checkpoint.

      iex> {:ok, compared} =
      ...>   VivaTensor.Compare.run("examples/models/viva-tiny",
      ...>     tensor: "model.layers.0.mlp.up_proj.weight",
      ...>     formats: [:nf4, :fp4],
      ...>     methods: [:rtn]
      ...>   )
      iex> for row <- compared.rows, do: {row.format, row.bits_per_weight, row.front}
      [{:nf4, 4.5, true}, {:fp4, 4.5, false}]

  Of a checkpoint the tensors count that a `VivaTensor.Recipe` would quantize, together:
  bits per weight and SQNR are those of all their weights. With activations the error of
  each layer's output is measured too, ‖X·Wᵀ − X·Ŵᵀ‖ / ‖X·Wᵀ‖; its mean over the layers
  is the row's.

  `front` marks the rows of which no other has fewer bits and less error, output error
  where there is one.
  """

  alias VivaTensor.{Calibration, Checkpoint, Error, Native, Quantized, Recipe, Report}
  alias VivaTensor.Compare.{Front, Histogram}

  # Methods that look at the weights alone, and those that look at activations.
  @plain [:rtn, :mse, :hqq]
  @calibrated Calibration.methods()

  @enforce_keys [:source, :tensors, :weights, :left_out, :measured_on, :rows, :absent]
  defstruct [:source, :tensors, :weights, :left_out, :measured_on, :rows, :absent]

  @typedoc """
  One format by one method. `tensors` is how many of the tensors it can hold: a row that
  cannot hold them all is never on the front. `seconds` are those of quantizing;
  `sqnr_db` is `nil` where there is no error; `histogram` is there on the front, if it was
  asked for.
  """
  @type row :: %{
          format: atom,
          method: atom,
          bits_per_weight: float,
          sqnr_db: float | nil,
          output_error: float | nil,
          seconds: float,
          tensors: pos_integer,
          front: boolean,
          histogram: histogram | nil
        }

  @typedoc """
  How many weights, and how many of the values that their codes stand for, are where: in bins
  from the least to the greatest value of each block, with zero in the middle if the format is
  symmetric; of a large tensor those of its first million elements.
  """
  @type histogram :: %{weights: [non_neg_integer], values: [non_neg_integer]}

  @typedoc """
  `measured_on` says whose activations the output error is of: those that the methods saw
  (`:calibration`) or others (`:held_out`). `left_out` are tensors that no activations
  are known of. `absent` says which format did not do what, and why.
  """
  @type t :: %__MODULE__{
          source: Path.t(),
          tensors: [String.t()],
          weights: non_neg_integer,
          left_out: [String.t()],
          measured_on: :calibration | :held_out | nil,
          rows: [row],
          absent: [%{format: atom, method: atom, reason: String.t(), tensors: [String.t()]}]
        }

  @doc """
  Compares. The source is a `.safetensors` or `.gguf` file, or a directory.

  Options:

    * `tensor:` - the name of one tensor; otherwise those that a recipe would quantize
    * `formats:` - every format
    * `methods:` - `[:rtn, :mse]`, with activations also `:awq`, `:gptq` and `:awq_gptq`
    * `scales:` - how those choose the scales of blocks, `:rtn` or `:mse`; by default each
      its own way
    * `activations:` - a `VivaTensor.Calibration` or its file, with an entry for each
      layer: the weight's name without `.weight`
    * `held_out:` - another one, of activations that are measured on and that no method
      sees
    * `histograms:` - `true` to see for the rows of the front where weights and the values
      of codes are
    * `progress:` - `{state, function}`: called with the state and a map of how far it is,
      it gives the next state

  ## Errors

  `:io`, `:invalid_file`, `:unknown_format`, `:unknown_tensor`, `:invalid_option`,
  `:already_quantized`, `:non_finite`.
  """
  @spec run(Path.t(), keyword) :: {:ok, t} | {:error, Error.t()}
  def run(source, options \\ []) do
    with {:ok, options} <- options(options),
         {:ok, checkpoint} <- Checkpoint.open(source),
         {:ok, seen} <- load(options.activations),
         {:ok, unseen} <- load(options.held_out),
         {:ok, entries, left_out} <- entries(checkpoint, options.tensor, [seen, unseen]),
         work = %{
           checkpoint: checkpoint,
           entries: entries,
           candidates: candidates(options, seen),
           seen: seen,
           unseen: unseen,
           histograms: options.histograms,
           progress: options.progress
         },
         {:ok, figures} <- measure(work) do
      {:ok,
       %__MODULE__{
         source: to_string(source),
         tensors: Enum.map(entries, & &1.name),
         weights: entries |> Enum.map(&elements/1) |> Enum.sum(),
         left_out: left_out,
         measured_on: if(unseen, do: :held_out, else: if(seen, do: :calibration)),
         rows: figures |> rows(length(entries)) |> mark_front(length(entries)),
         absent: absent(figures)
       }}
    end
  end

  @doc "Like `run/2`, but raises `VivaTensor.Error`."
  @spec run!(Path.t(), keyword) :: t
  def run!(source, options \\ []), do: Error.bang!(run(source, options))

  # What is asked for

  defp options(given) do
    defaults = %{
      tensor: nil,
      formats: Enum.map(VivaTensor.formats(), & &1.name),
      methods: nil,
      scales: nil,
      activations: nil,
      held_out: nil,
      histograms: false,
      progress: {nil, fn nil, _status -> nil end}
    }

    with {:ok, options} <- known(given, defaults),
         :ok <- each(options.formats, &format/1),
         :ok <- each(options.methods || [], &method/1),
         :ok <- scales(options.scales),
         do: {:ok, options}
  end

  defp known(given, defaults) do
    case Enum.find(Keyword.keys(given), &(not is_map_key(defaults, &1))) do
      nil ->
        {:ok, Map.merge(defaults, Map.new(given))}

      key ->
        known = defaults |> Map.keys() |> Enum.join(", ")
        Error.option(:compare, "#{key}", "no such option; it takes #{known}")
    end
  end

  defp each(list, check) do
    Enum.reduce_while(list, :ok, fn item, :ok ->
      case check.(item) do
        {:error, error} -> {:halt, {:error, error}}
        _ -> {:cont, :ok}
      end
    end)
  end

  # A format without a layout is no recipe, and can be compared.
  defp format(name) do
    if Enum.any?(VivaTensor.formats(), &(&1.name == name)),
      do: :ok,
      else: name |> Native.spec_new([], nil) |> Error.wrap(:recipe)
  end

  defp method(name) when name in @plain or name in @calibrated, do: :ok

  defp method(name) do
    known = Enum.join(@plain ++ @calibrated, ", ")
    Error.option(:compare, "methods", "no method #{name}; there are #{known}")
  end

  defp scales(by) when by in [nil, :rtn, :mse], do: :ok
  defp scales(by), do: Error.option(:compare, "scales", "expected rtn or mse, got #{by}")

  defp candidates(options, seen) do
    default = if seen, do: [:rtn, :mse, :awq, :gptq, :awq_gptq], else: [:rtn, :mse]

    for format <- options.formats, method <- options.methods || default do
      scales = if method in @calibrated and options.scales, do: [scales: options.scales], else: []
      {format, method, [method: method] ++ scales}
    end
  end

  defp load(nil), do: {:ok, nil}
  defp load(%Calibration{} = calibration), do: {:ok, calibration}
  defp load(path), do: Calibration.load(path)

  # Tensors

  defp entries(checkpoint, nil, calibrations) do
    with {:ok, recipe} <- Recipe.new(format: :int8) do
      linear =
        for entry <- checkpoint.entries,
            Recipe.decide(recipe, entry, checkpoint.config) == :quantize,
            do: entry

      known = for %Calibration{} = c <- calibrations, do: c |> layers() |> MapSet.new()

      {entries, left_out} =
        Enum.split_with(linear, fn entry -> Enum.all?(known, &(layer(entry.name) in &1)) end)

      case entries do
        [_ | _] -> {:ok, entries, Enum.map(left_out, & &1.name)}
        [] -> nothing(left_out)
      end
    end
  end

  defp entries(checkpoint, name, _calibrations) do
    with {:ok, tensor} <- checkpoint.ref |> Native.checkpoint_get(name) |> Error.wrap(:compare) do
      case tensor do
        {:tensor, %{shape: shape, ref: ref}} ->
          Native.tensor_release(ref)
          {:ok, [%{name: name, shape: shape}], []}

        {:quantized, %{format: format}} ->
          {:error, already_quantized(name, format)}
      end
    end
  end

  defp nothing([]) do
    Error.option(
      :compare,
      "tensor",
      "the source has no float weight that a recipe would quantize; name the one to compare on"
    )
  end

  defp nothing([entry | _]) do
    Error.option(
      :compare,
      "activations",
      "of no weight are there any; #{layer(entry.name)} would be the name for #{entry.name}"
    )
  end

  defp already_quantized(name, format) do
    Error.new(
      :source,
      {:already_quantized, %{quant_method: format}},
      "#{name} is quantized already (#{format}); compare on the weights that it was made from"
    )
  end

  defp layers(calibration), do: Enum.map(Calibration.layers(calibration), & &1.name)

  defp layer(weight), do: String.replace_suffix(weight, ".weight", "")

  defp elements(%{shape: shape}), do: Enum.product(shape)

  # Figures: one map for each candidate and tensor

  defp measure(work) do
    started = System.monotonic_time()
    steps = for entry <- work.entries, candidate <- work.candidates, do: {entry, candidate}
    bytes = steps |> Enum.map(&bytes/1) |> Enum.sum()
    {state, show} = work.progress

    steps
    |> Enum.with_index(1)
    |> Enum.reduce_while({[], 0, state}, fn {{entry, candidate} = step, index},
                                            {all, sum, state} ->
      case figures(work, entry, candidate) do
        {:ok, figures} ->
          sum = sum + bytes(step)
          done = div(index, length(work.candidates))
          state = show.(state, status(done, length(work.entries), sum, bytes, started))
          {:cont, {[figures | all], sum, state}}

        {:error, error} ->
          {:halt, {:error, error}}
      end
    end)
    |> case do
      {:error, error} -> {:error, error}
      {figures, _sum, _state} -> some(Enum.reverse(figures))
    end
  end

  # Where nothing could be measured, the first reason is the answer.
  defp some(figures) do
    if Enum.all?(figures, & &1[:error]),
      do: {:error, hd(figures).error},
      else: {:ok, figures}
  end

  # As many as the floats that are looked at.
  defp bytes({entry, _candidate}), do: 4 * elements(entry)

  defp status(done, tensors, sum, bytes, started) do
    elapsed = System.monotonic_time() - started
    rate = sum / max(System.convert_time_unit(elapsed, :native, :microsecond), 1) * 1.0e6

    %{
      state: :running,
      tensors_done: done,
      tensors: tensors,
      bytes_done: sum,
      bytes: bytes,
      bytes_per_second: rate,
      eta_seconds: (bytes - sum) / max(rate, 1.0)
    }
  end

  defp figures(work, entry, {format, method, options}) do
    figures = %{name: entry.name, format: format, method: method, elements: elements(entry)}
    layer = layer(entry.name)
    seen = if method in @calibrated, do: [activations: work.seen, layer: layer], else: []

    with {:ok, weight} <- weight(work.checkpoint, entry.name),
         {:ok, rows} <- rows_of(work.unseen || work.seen, layer) do
      {microseconds, result} =
        :timer.tc(fn -> VivaTensor.quantize(weight, format, options ++ seen) end)

      with {:ok, q} <- result,
           {:ok, metrics} <- VivaTensor.metrics(weight, q, activations: rows),
           {:ok, histogram} <- histogram(work, weight, q) do
        Quantized.release(q)
        own = %{seconds: microseconds / 1.0e6, histogram: histogram}
        {:ok, figures |> Map.merge(metrics) |> Map.merge(own)}
      else
        {:error, error} -> absence(error, figures)
      end
    end
  end

  defp histogram(%{histograms: true}, weight, q), do: Histogram.of(weight, q)
  defp histogram(_work, _weight, _q), do: {:ok, nil}

  defp weight(checkpoint, name) do
    case Checkpoint.get(checkpoint, name) do
      {:ok, %Quantized{format: format}} -> {:error, already_quantized(name, format)}
      other -> other
    end
  end

  defp rows_of(nil, _layer), do: {:ok, nil}
  defp rows_of(calibration, layer), do: Calibration.samples(calibration, layer)

  # Formats that have no such method, or no block that divides the rows, are said and
  # left; whatever else is wrong would be wrong with all of them.
  defp absence(%Error{reason: {kind, details}} = error, figures) do
    if kind in [:indivisible, :scale_overflow] or details[:option] in ["method", "format"] do
      {:ok, Map.put(figures, :error, error)}
    else
      {:error, error}
    end
  end

  defp reason(%Error{reason: {:invalid_option, _}}), do: "the format has no such method"
  defp reason(%Error{message: message}), do: message

  # Rows

  defp rows(figures, tensors) do
    for {{format, method}, all} <- by_candidate(figures),
        measured = Enum.reject(all, & &1[:error]),
        measured != [] do
      %{
        format: format,
        method: method,
        bits_per_weight: weighted(measured, & &1.bits_per_weight),
        sqnr_db: Report.sqnr_db(measured),
        output_error: mean(measured),
        seconds: measured |> Enum.map(& &1.seconds) |> Enum.sum(),
        tensors: length(measured),
        histogram: measured |> Enum.map(& &1.histogram) |> Histogram.sum()
      }
    end
    |> Enum.sort_by(&{&1.tensors < tensors, &1.bits_per_weight, loss(&1), &1.format, &1.method})
  end

  defp by_candidate(figures), do: figures |> Enum.group_by(&{&1.format, &1.method})

  defp weighted(figures, figure) do
    sum = figures |> Enum.map(&(figure.(&1) * &1.elements)) |> Enum.sum()
    sum / max(figures |> Enum.map(& &1.elements) |> Enum.sum(), 1)
  end

  defp mean(figures) do
    errors = Enum.map(figures, & &1[:output_error])
    if Enum.all?(errors, &is_number/1), do: Enum.sum(errors) / length(errors)
  end

  defp mark_front(rows, tensors) do
    whole = for row <- rows, row.tensors == tensors, do: {row.bits_per_weight, loss(row)}

    for row <- rows do
      mine = {row.bits_per_weight, loss(row)}
      beaten? = Enum.any?(whole, &(&1 != mine and beats?(&1, mine)))
      front? = row.tensors == tensors and not beaten?
      %{Map.put(row, :front, front?) | histogram: if(front?, do: row.histogram)}
    end
  end

  defp beats?({bits, loss}, {their_bits, their_loss}),
    do: bits <= their_bits and loss <= their_loss

  # The less, the better.
  defp loss(%{output_error: error}) when is_number(error), do: error
  defp loss(%{sqnr_db: nil}), do: -1.0e300
  defp loss(%{sqnr_db: decibels}), do: -decibels

  defp absent(figures) do
    for {{format, method, reason}, all} <-
          Enum.group_by(
            for(%{error: error} = figures <- figures, do: {figures, reason(error)}),
            fn {figures, reason} -> {figures.format, figures.method, reason} end,
            fn {figures, _reason} -> figures.name end
          ) do
      %{format: format, method: method, reason: reason, tensors: all}
    end
  end

  @doc """
  A plot of the rows: bits per weight, and output error or else SQNR. SVG.
  """
  @spec svg(t) :: iodata
  def svg(%__MODULE__{} = compared) do
    measured_on = compared.measured_on && to_string(compared.measured_on)
    title = "#{Path.basename(compared.source)}: #{about(compared)}"
    Front.svg(compared.rows, measured_on, title)
  end

  @doc "What was compared on, in a few words."
  @spec about(t) :: String.t()
  def about(%__MODULE__{tensors: [name]}), do: name
  def about(%__MODULE__{tensors: names, weights: n}), do: "#{length(names)} tensors, #{n} weights"

  @doc "Whose activations the output error is of."
  @spec measured_on(t) :: String.t() | nil
  def measured_on(%__MODULE__{measured_on: nil}), do: nil

  def measured_on(%__MODULE__{measured_on: :held_out}),
    do: "on activations that no method saw"

  def measured_on(%__MODULE__{measured_on: :calibration}),
    do: "on the calibration's own activations, which flatters methods that saw them"
end

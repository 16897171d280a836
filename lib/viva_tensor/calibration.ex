defmodule VivaTensor.Calibration do
  @moduledoc """
  What is remembered of the activations that the weights of a model met: enough for
  every method that looks at them, in memory that does not grow with their number.

      iex> calibration = VivaTensor.Calibration.new()
      iex> x = VivaTensor.Tensor.from_list!([1.0, 2.0, -3.0, 0.5], :f32, [2, 2])
      iex> :ok = VivaTensor.Calibration.add(calibration, "model.layers.0.mlp.up_proj", x)
      iex> VivaTensor.Calibration.layers(calibration)
      [%{name: "model.layers.0.mlp.up_proj", columns: 2, tokens: 2}]

  A layer is named as its module is: its weight without `.weight`. For k input
  columns it takes 2·k² bytes for the Gram matrix Σ xᵀx, 4·k for every kept row, and
  little more.

  A calibration is native memory that `add/3` changes in place, as `:counters` does:
  it may be shared by the processes of a node. Other nodes make their own, `save/2`
  it, and one of them merges what it `load/1`s.

  The file is safetensors, and other programs can write it (`examples/calibration`
  does it with transformers): for every layer the tensors `….gram` (f32 `[k, k]`),
  `….sum_abs` (f64 `[k]`), `….max_abs` (f32 `[k]`), `….samples` (f32 `[rows, k]`) and
  `….tokens` (i64 `[1]`).
  """

  alias VivaTensor.{Error, Native, Tensor}

  @enforce_keys [:ref]
  defstruct [:ref]

  @type t :: %__MODULE__{ref: reference}

  @doc "The methods of `VivaTensor.quantize/3` that look at activations."
  @spec methods() :: [atom]
  def methods, do: [:awq, :gptq, :awq_gptq, :smoothquant, :rotate]

  @doc """
  A calibration without layers.

  Options: `samples:` rows of activations that are kept of each layer (512), for
  methods that try out what they do to the layer's output.
  """
  @spec new(samples: non_neg_integer) :: t
  def new(options \\ []) do
    [samples: samples] = Keyword.validate!(options, samples: 512)
    %__MODULE__{ref: Native.calibration_new(samples)}
  end

  @doc """
  Adds a batch of activations `[…, k]` to a layer.

  ## Errors

  `:shape_mismatch` when the layer had another number of columns, `:non_finite`,
  `:unsupported_dtype`; the layer is then as it was.
  """
  @spec add(t, String.t(), Tensor.t()) :: :ok | {:error, Error.t()}
  def add(%__MODULE__{ref: ref}, layer, %Tensor{ref: x}) when is_binary(layer) do
    done(Native.calibration_add(ref, layer, x), :calibrate)
  end

  @doc "Like `add/3`, but raises `VivaTensor.Error`."
  @spec add!(t, String.t(), Tensor.t()) :: :ok
  def add!(calibration, layer, x), do: bang!(add(calibration, layer, x))

  @doc "Adds to a calibration what another one saw."
  @spec merge(t, t) :: :ok | {:error, Error.t()}
  def merge(%__MODULE__{ref: ref}, %__MODULE__{ref: other}) do
    done(Native.calibration_merge(ref, other), :calibrate)
  end

  @doc "Like `merge/2`, but raises `VivaTensor.Error`."
  @spec merge!(t, t) :: :ok
  def merge!(calibration, other), do: bang!(merge(calibration, other))

  @doc """
  Writes a file, which appears under its name only when it is complete and synced.
  """
  @spec save(t, Path.t()) :: :ok | {:error, Error.t()}
  def save(%__MODULE__{ref: ref}, path) do
    done(Native.calibration_save(ref, IO.chardata_to_string(path)), :save)
  end

  @doc "Like `save/2`, but raises `VivaTensor.Error`."
  @spec save!(t, Path.t()) :: :ok
  def save!(calibration, path), do: bang!(save(calibration, path))

  @doc """
  Reads a file that `save/2` or another program wrote.

  ## Errors

  `:io`, and `:invalid_file` with what is wrong.

      iex> {:error, error} = VivaTensor.Calibration.load("no/such/file.safetensors")
      iex> elem(error.reason, 0)
      :io
  """
  @spec load(Path.t()) :: {:ok, t} | {:error, Error.t()}
  def load(path) do
    with {:ok, ref} <- Error.wrap(Native.calibration_load(IO.chardata_to_string(path)), :load) do
      {:ok, %__MODULE__{ref: ref}}
    end
  end

  @doc "Like `load/1`, but raises `VivaTensor.Error`."
  @spec load!(Path.t()) :: t
  def load!(path), do: Error.bang!(load(path))

  @doc "The layers: name, input columns, and rows of activations seen."
  @spec layers(t) :: [
          %{name: String.t(), columns: non_neg_integer, tokens: non_neg_integer}
        ]
  def layers(%__MODULE__{ref: ref}), do: Native.calibration_layers(ref)

  @doc """
  The rows of activations that are kept of a layer, f32 `[rows, k]`.

  ## Errors

  `:unknown_tensor`, with a similar name where there is one.
  """
  @spec samples(t, String.t()) :: {:ok, Tensor.t()} | {:error, Error.t()}
  def samples(%__MODULE__{ref: ref}, layer) when is_binary(layer) do
    ref |> Native.calibration_samples(layer) |> Tensor.wrap(:samples)
  end

  @doc "Like `samples/2`, but raises `VivaTensor.Error`."
  @spec samples!(t, String.t()) :: Tensor.t()
  def samples!(calibration, layer), do: Error.bang!(samples(calibration, layer))

  defp done({:ok, :ok}, _op), do: :ok
  defp done(error, op), do: Error.wrap(error, op)

  defp bang!(:ok), do: :ok
  defp bang!({:error, error}), do: raise(error)
end

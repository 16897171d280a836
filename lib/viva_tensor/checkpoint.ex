defmodule VivaTensor.Checkpoint do
  @moduledoc """
  A checkpoint on disk, mapped: a `.safetensors` or `.gguf` file, a sharded
  directory with its index, or a Hugging Face model directory.

      iex> {:ok, ckpt} = VivaTensor.Checkpoint.open("examples/models/viva-tiny")
      iex> VivaTensor.Checkpoint.get!(ckpt, "model.norm.weight")
      #VivaTensor.Tensor<bf16[256]>

  Opening reads headers alone; tensors are read in place when they are used.
  The files must not change while they are mapped.
  """

  alias VivaTensor.{Error, Native, Quantized, Tensor}

  @enforce_keys [:ref, :path, :entries, :files, :companions, :protected, :config, :total_bytes]
  defstruct [:ref, :path, :entries, :files, :companions, :protected, :config, :total_bytes]

  @typedoc "One named tensor of a file. The dtype is a string: files know more of them than `VivaTensor.Tensor`."
  @type entry :: %{
          name: String.t(),
          dtype: String.t(),
          shape: Tensor.shape(),
          nbytes: non_neg_integer,
          file: Path.t()
        }

  @typedoc """
  `companions` are the other files of a model directory (tokenizer,
  configuration), `config` its `config.json` (for the GGUF file of a Llama, what
  that would say), `total_bytes` the tensors' bytes.
  """
  @type t :: %__MODULE__{
          ref: reference,
          path: Path.t(),
          entries: [entry],
          files: [Path.t()],
          companions: [%{relative: Path.t(), file: Path.t()}],
          protected: [Path.t()],
          config: map | nil,
          total_bytes: non_neg_integer
        }

  @doc """
  Opens and validates a checkpoint.

  ## Errors

  `:io` when it cannot be read, `:invalid_file` when it is not what it claims
  to be: truncated, overlapping or lying headers, a shard that is missing.

      iex> {:error, error} = VivaTensor.Checkpoint.open("no/such/model")
      iex> {:io, %{code: "enoent"}} = error.reason
  """
  @spec open(Path.t()) :: {:ok, t} | {:error, Error.t()}
  def open(path) do
    with {:ok, fields} <- path |> Path.expand() |> Native.checkpoint_open() |> Error.wrap(:open) do
      {:ok, struct!(__MODULE__, fields)}
    end
  end

  @doc "Like `open/1`, but raises `VivaTensor.Error`."
  @spec open!(Path.t()) :: t
  def open!(path), do: Error.bang!(open(path))

  @doc """
  One tensor by name: a `VivaTensor.Tensor` mapped from the file, or a
  `VivaTensor.Quantized` when the checkpoint spells it in a layout that we know.

  In the GGUF file of a Llama, a tensor may also be asked for by the name that it
  has in `transformers`: `model.layers.0.self_attn.q_proj.weight` for
  `blk.0.attn_q.weight`. Its rows are then in `transformers`' order, which for
  queries and keys is another one.

      iex> ckpt = VivaTensor.Checkpoint.open!("examples/models/viva-tiny")
      iex> {:error, error} = VivaTensor.Checkpoint.get(ckpt, "model.norm.wieght")
      iex> Exception.message(error)
      ~s(get: no tensor named "model.norm.wieght"; did you mean "model.norm.weight"?)
  """
  @spec get(t, String.t()) :: {:ok, Tensor.t() | Quantized.t()} | {:error, Error.t()}
  def get(%__MODULE__{ref: ref}, name) when is_binary(name) do
    with {:ok, found} <- ref |> Native.checkpoint_get(name) |> Error.wrap(:get) do
      case found do
        {:tensor, fields} -> {:ok, struct!(Tensor, fields)}
        {:quantized, fields} -> {:ok, struct!(Quantized, fields)}
      end
    end
  end

  @doc "Like `get/2`, but raises `VivaTensor.Error`."
  @spec get!(t, String.t()) :: Tensor.t() | Quantized.t()
  def get!(checkpoint, name), do: Error.bang!(get(checkpoint, name))

  @typedoc "A tensor as a person counts them: the parts of one quantized weight are one."
  @type content :: %{
          name: String.t(),
          format: String.t(),
          layout: atom,
          shape: Tensor.shape(),
          nbytes: non_neg_integer,
          bits_per_weight: float,
          tensors: [String.t()]
        }

  @doc """
  What the checkpoint holds, with the parts of each quantized weight folded
  into one row.

      iex> ckpt = VivaTensor.Checkpoint.open!("examples/models/viva-tiny")
      iex> {:ok, [row | _]} = VivaTensor.Checkpoint.contents(ckpt)
      iex> {row.name, row.format, row.layout}
      {"model.embed_tokens.weight", "bf16", nil}
  """
  @spec contents(t) :: {:ok, [content]} | {:error, Error.t()}
  def contents(%__MODULE__{ref: ref}) do
    ref |> Native.checkpoint_contents() |> Error.wrap(:contents)
  end

  @doc "Like `contents/1`, but raises `VivaTensor.Error`."
  @spec contents!(t) :: [content]
  def contents!(checkpoint), do: Error.bang!(contents(checkpoint))

  @doc """
  Unmaps the files once the last tensor read from them is gone.
  """
  @spec release(t) :: :ok
  def release(%__MODULE__{ref: ref}), do: Native.checkpoint_release(ref)

  defimpl Inspect do
    def inspect(%{path: path, entries: entries, total_bytes: bytes}, _opts) do
      "#VivaTensor.Checkpoint<#{path}, #{length(entries)} tensors, #{bytes} bytes>"
    end
  end
end

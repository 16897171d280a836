defmodule VivaTensor.Nx do
  @moduledoc """
  Nx tensors in and out, and products with quantized weights inside `defn`.

  Nx is found where it is, and never required: with `{:nx, "~> 0.11"}` among the
  dependencies of an application these functions work, without it those that need it
  return `:missing_library`. Everything but products inside `defn` works with older
  releases too; `Nx.runtime_call/4`, which these need, came with 0.11.

  An application that had viva_tensor before it had Nx compiles it once more, with
  `mix deps.compile viva_tensor --force`: what lets weights into `defn` is in it only then.

  ## Types

  | Nx | `VivaTensor.Tensor` |
  |---|---|
  | `f64`, `f32`, `f16`, `bf16` | the same |
  | `f8_e4m3fn`, `f8` | `:f8_e4m3`, `:f8_e5m2` |
  | `s64`, `s32`, `s16`, `s8` | `:i64`, `:i32`, `:i16`, `:i8` |
  | `u64`, `u32`, `u16`, `u8` | the same |
  | `s4`, `s2`; `u4`, `u2` | `:i8`; `:u8`, as no dtype is narrower than a byte |
  | `c64`, `c128` | refused |

  The other way, `:bool` is `u8`, as Nx has booleans, and `:f8_e8m0` is refused.

  ## What is copied

  Nothing, in either direction: `from_nx/1` reads the binary of an `Nx.BinaryBackend`
  tensor in place, and a tensor from `to_nx/2` is over the very binary that a result lies
  in. Copied are what another backend holds (`Nx.to_binary/1`), elements narrower than a
  byte, and tensors of a checkpoint or from lists, which lie in no binary.

  ## Axes

  Names and vectorized axes of what a product multiplies are those of its result. A
  `VivaTensor.Tensor` has neither: vectorized axes come first in its shape, as
  `Nx.devectorize/2` has them; `to_nx/2` takes `names:` to give.

  ## Inside `defn`

      defmodule Layer do
        import Nx.Defn

        defn forward(x, weight, bias) do
          x |> VivaTensor.Nx.dense(weight, bias) |> Nx.max(0)
        end
      end

      Layer.forward(x, VivaTensor.Nx.quantize!(weight, :nf4), bias)

  A `VivaTensor.Quantized` or `VivaTensor.Packed` is an `Nx.Container` without tensors: it
  passes through `defn` as it is, and `dot/3` and `dense/4` become a call of native code
  in the computation, whose result's shape and type are known, and checked, while it is
  traced. As `defn` returns tensors, there they return no `{:ok, tensor}`: they are
  `dot!/3` and `dense!/4`. Gradients go through a `VivaTensor.Quantized`, whose values are
  there as floats for that moment, to what it multiplies and to the bias; the weight itself
  is not trained.

  A compiler that caches what it compiled, such as EXLA, compiles once for each weight, and
  keeps it.
  """

  alias VivaTensor.{Error, Options, Packed, Quantized, Tensor}
  alias VivaTensor.Nx.{Product, Type}

  @compile {:no_warn_undefined, [Nx, Nx.BinaryBackend]}

  @typedoc "An `Nx.Tensor`."
  @type tensor :: struct

  @type weight :: Quantized.t() | Packed.t()

  @typedoc "Nx's name of a type, as `:f32` or as `{:f, 32}`."
  @type type :: atom | {atom, pos_integer}

  @type product_options :: [
          type: type,
          compute: :f32 | :bf16 | :int8 | :llm_int8 | :auto
        ]

  @doc """
  The `VivaTensor.Tensor` of an Nx tensor, which reads it in place.

  ## Errors

  `:unsupported_dtype` for complex numbers, `:invalid_option` for what is no tensor or has
  no values yet, such as an argument of `defn`.
  """
  @spec from_nx(tensor) :: {:ok, Tensor.t()} | {:error, Error.t()}
  def from_nx(tensor), do: read(:from_nx, tensor)

  @doc "Like `from_nx/1`, but raises `VivaTensor.Error`."
  @spec from_nx!(tensor) :: Tensor.t()
  def from_nx!(tensor), do: Error.bang!(from_nx(tensor))

  @doc """
  The Nx tensor of a `VivaTensor.Tensor`, on `Nx.BinaryBackend`.

  Options: `names:` of its axes.

  ## Errors

  `:unsupported_dtype` for `:f8_e8m0`, `:invalid_option` for names that Nx refuses,
  `:shape_mismatch` for a tensor of no elements, which Nx has not, `:missing_library`.
  """
  @spec to_nx(Tensor.t(), names: [atom]) :: {:ok, tensor} | {:error, Error.t()}
  def to_nx(%Tensor{} = tensor, options \\ []) do
    with {:ok, [names]} <- Options.take(:to_nx, options, names: nil) do
      give(:to_nx, tensor, names)
    end
  end

  @doc "Like `to_nx/2`, but raises `VivaTensor.Error`."
  @spec to_nx!(Tensor.t(), names: [atom]) :: tensor
  def to_nx!(tensor, options \\ []), do: Error.bang!(to_nx(tensor, options))

  @doc """
  Quantizes an Nx tensor: `VivaTensor.quantize/3` of it, with the same formats and options.

  `activations:` may be an Nx tensor too. A vectorized tensor is many weights, and refused;
  `Nx.devectorize/2` makes it one.
  """
  @spec quantize(tensor, atom, keyword) :: {:ok, Quantized.t()} | {:error, Error.t()}
  def quantize(tensor, format, options \\ [])

  def quantize(%{vectorized_axes: [_ | _] = axes}, _format, _options) do
    message =
      "expected one weight, got one for each of #{inspect(axes)}; Nx.devectorize/2 makes " <>
        "them its first dimensions"

    Error.option(:quantize, "tensor", message)
  end

  def quantize(tensor, format, options) do
    with {:ok, tensor} <- read(:quantize, tensor),
         {:ok, options} <- activations(options) do
      VivaTensor.quantize(tensor, format, options)
    end
  end

  @doc "Like `quantize/3`, but raises `VivaTensor.Error`."
  @spec quantize!(tensor, atom, keyword) :: Quantized.t()
  def quantize!(tensor, format, options \\ []),
    do: Error.bang!(quantize(tensor, format, options))

  @doc """
  The values of a quantized tensor as an Nx tensor, each rounded once.

  Options: `type:` any of Nx's float types, by default the one that it was quantized from;
  `names:` of its axes.
  """
  @spec dequantize(Quantized.t(), type: type, names: [atom]) ::
          {:ok, tensor} | {:error, Error.t()}
  def dequantize(%Quantized{} = quantized, options \\ []) do
    with {:ok, [type, names]} <- Options.take(:dequantize, options, type: nil, names: nil),
         {:ok, dtype} <- Type.option(:dequantize, type, quantized.dtype),
         {:ok, tensor} <- VivaTensor.dequantize(quantized, dtype: dtype) do
      give(:dequantize, tensor, names)
    end
  end

  @doc "Like `dequantize/2`, but raises `VivaTensor.Error`."
  @spec dequantize!(Quantized.t(), type: type, names: [atom]) :: tensor
  def dequantize!(quantized, options \\ []), do: Error.bang!(dequantize(quantized, options))

  @doc """
  x · wᵀ for x `[…, k]` and a quantized w `[n, k]`, straight from the codes: what
  `Nx.dot(x, [-1], dequantize!(w), [1])` is. The result is `[…, n]`, its last axis without
  a name.

  Options: `type:` of the result, by default that of x; `compute:` the arithmetic, as
  `VivaTensor.matmul/3` has it.

  ## Errors

  `:shape_mismatch`, `:unsupported_dtype`, `:invalid_option`; inside `defn`
  `:missing_library` where Nx has no `Nx.runtime_call/4`.
  """
  @spec dot(tensor, weight, product_options) :: {:ok, tensor} | {:error, Error.t()}
  def dot(x, weight, options \\ []), do: Product.product(:dot, x, weight, nil, options)

  @doc "Like `dot/3`, but raises `VivaTensor.Error`."
  @spec dot!(tensor, weight, product_options) :: tensor
  def dot!(x, weight, options \\ []), do: Error.bang!(dot(x, weight, options))

  @doc """
  A dense layer: `dot/3` and a bias `[n]`, added in f32 before the result is rounded.
  """
  @spec dense(tensor, weight, tensor, product_options) :: {:ok, tensor} | {:error, Error.t()}
  def dense(x, weight, bias, options \\ []),
    do: Product.product(:dense, x, weight, bias, options)

  @doc "Like `dense/4`, but raises `VivaTensor.Error`."
  @spec dense!(tensor, weight, tensor, product_options) :: tensor
  def dense!(x, weight, bias, options \\ []), do: Error.bang!(dense(x, weight, bias, options))

  # What defn calls for a function that it meets in its body: Nx.Defn.deftransform/2 makes
  # the same, and would have to be there when this is compiled.
  for {name, raising, arity} <- [
        {:dot, :dot!, 2},
        {:dot, :dot!, 3},
        {:dot!, :dot!, 2},
        {:dot!, :dot!, 3},
        {:dense, :dense!, 3},
        {:dense, :dense!, 4},
        {:dense!, :dense!, 3},
        {:dense!, :dense!, 4}
      ] do
    arguments = Macro.generate_arguments(arity, __MODULE__)

    @doc false
    def unquote(:"__defn:#{name}__")(unquote_splicing(arguments)),
      do: unquote(raising)(unquote_splicing(arguments))
  end

  @doc false
  # The tensor that an operation is given, whatever holds its elements.
  def read(op, %{__struct__: Nx.Tensor, data: %{__struct__: backend}})
      when backend in [Nx.Defn.Expr, Nx.TemplateBackend] do
    message =
      "expected a tensor with values, which one that is being traced has not; inside defn " <>
        "use dot/3 or dense/4"

    Error.option(op, "tensor", message)
  end

  def read(op, %{__struct__: Nx.Tensor} = tensor) do
    with {:ok, dtype} <- Type.dtype(op, tensor.type) do
      tensor = Nx.devectorize(tensor)
      bytes = tensor |> Nx.to_binary() |> Type.bytes(tensor.type)
      Tensor.from_binary(bytes, dtype, Tuple.to_list(tensor.shape))
    end
  end

  def read(op, other),
    do: Error.option(op, "tensor", "expected an Nx.Tensor, got #{inspect(other)}")

  @doc false
  # The Nx tensor that an operation returns.
  def give(op, %Tensor{shape: shape, dtype: dtype} = tensor, names) do
    with :ok <- present(op),
         {:ok, type} <- Type.type(op, dtype),
         :ok <- not_empty(op, shape),
         {:ok, binary} <- Tensor.to_binary(tensor) do
      flat = Nx.from_binary(binary, type, backend: Nx.BinaryBackend)

      try do
        {:ok,
         Nx.reshape(flat, List.to_tuple(shape), names: names || Enum.map(shape, fn _ -> nil end))}
      rescue
        error in ArgumentError -> Error.option(op, "names", Exception.message(error))
      end
    end
  end

  defp present(op) do
    if Code.ensure_loaded?(Nx) do
      :ok
    else
      message = "Nx is not there; add {:nx, \"~> 0.11\"} to the dependencies of your application"
      {:error, Error.new(op, {:missing_library, %{library: "nx"}}, message)}
    end
  end

  defp not_empty(op, shape) do
    if 0 in shape do
      reason = {:shape_mismatch, %{what: "a tensor with elements", expected: [], actual: shape}}

      {:error,
       Error.new(
         op,
         reason,
         "Nx has no tensors of no elements, and this has shape #{inspect(shape)}"
       )}
    else
      :ok
    end
  end

  defp activations(options) do
    with true <- Keyword.keyword?(options),
         %{__struct__: Nx.Tensor} = seen <- options[:activations],
         {:ok, seen} <- read(:quantize, seen) do
      {:ok, Keyword.put(options, :activations, seen)}
    else
      {:error, error} -> {:error, error}
      _ -> {:ok, options}
    end
  end
end

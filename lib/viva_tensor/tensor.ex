defmodule VivaTensor.Tensor do
  @moduledoc """
  A dense, row-major tensor that native code reads in place.

  Its elements live in a BEAM binary, in a mapped file region
  (`VivaTensor.Checkpoint.get/2`) or in memory of the library; none is copied on
  the way in. The struct is immutable and cheap to send to another process of
  the same node; between nodes send `to_binary/1`, or a path.

  Dtypes: `:f64`, `:f32`, `:f16`, `:bf16`, the 8-bit floats `:f8_e4m3`,
  `:f8_e5m2` and `:f8_e8m0` (powers of two), `:i64`, `:i32`, `:i16`, `:i8`,
  `:u64`, `:u32`, `:u16`, `:u8`, `:bool`. Binaries are little-endian.

  What a float dtype cannot hold exactly is rounded to nearest, ties to even;
  past its range f16 and bf16 become infinite and 8-bit floats the largest finite
  value. 8-bit floats are numbers as they stand: a scale that a checkpoint keeps
  beside them is not applied.
  """

  alias VivaTensor.{Error, Native}

  @enforce_keys [:ref, :dtype, :shape]
  defstruct [:ref, :dtype, :shape]

  @type dtype ::
          :f64
          | :f32
          | :f16
          | :bf16
          | :f8_e4m3
          | :f8_e5m2
          | :f8_e8m0
          | :i64
          | :i32
          | :i16
          | :i8
          | :u64
          | :u32
          | :u16
          | :u8
          | :bool
  @type float_dtype :: :f64 | :f32 | :f16 | :bf16 | :f8_e4m3 | :f8_e5m2 | :f8_e8m0
  @type shape :: [non_neg_integer]
  @type t :: %__MODULE__{ref: reference, dtype: dtype, shape: shape}

  @typedoc "A list of numbers, nested or flat; `:nan`, `:infinity` and `:neg_infinity` are numbers too."
  @type elements :: [number | boolean | atom | elements]

  @doc """
  A tensor over `binary`, read in place: row-major, little-endian.

      iex> {:ok, t} = VivaTensor.Tensor.from_binary(<<1.0::float-32-little, 2.0::float-32-little>>, :f32, [2])
      iex> t
      #VivaTensor.Tensor<f32[2]>

  ## Errors

  `:size_mismatch` unless the binary has exactly the shape's size,
  `:unknown_dtype`, `:shape_overflow`, `:invalid_option` for what is no shape.
  """
  @spec from_binary(binary, dtype, shape) :: {:ok, t} | {:error, Error.t()}
  def from_binary(binary, dtype, shape) when is_binary(binary) do
    with :ok <- check(:from_binary, dtype, shape) do
      binary |> Native.tensor_from_binary_in_place(dtype, shape) |> wrap(:from_binary)
    end
  end

  @doc "Like `from_binary/3`, but raises `VivaTensor.Error`."
  @spec from_binary!(binary, dtype, shape) :: t
  def from_binary!(binary, dtype, shape), do: Error.bang!(from_binary(binary, dtype, shape))

  @doc """
  A tensor with the elements of a flat or nested list, in row-major order.

      iex> {:ok, t} = VivaTensor.Tensor.from_list([[1, 2.5], [3, :infinity]], :f16, [2, 2])
      iex> VivaTensor.Tensor.to_list!(t)
      [1.0, 2.5, 3.0, :infinity]

  ## Errors

  `:size_mismatch` when the list is too long or short, `:invalid_option` naming
  the element that the dtype cannot hold.
  """
  @spec from_list(elements, dtype, shape) :: {:ok, t} | {:error, Error.t()}
  def from_list(list, dtype, shape) when is_list(list) do
    with :ok <- check(:from_list, dtype, shape) do
      list |> List.flatten() |> Native.tensor_from_list(dtype, shape) |> wrap(:from_list)
    end
  end

  @doc "Like `from_list/3`, but raises `VivaTensor.Error`."
  @spec from_list!(elements, dtype, shape) :: t
  def from_list!(list, dtype, shape), do: Error.bang!(from_list(list, dtype, shape))

  @doc """
  The elements as one binary: row-major, little-endian.

      iex> t = VivaTensor.Tensor.from_list!([1, 2, 3], :u8, [3])
      iex> VivaTensor.Tensor.to_binary(t)
      {:ok, <<1, 2, 3>>}
  """
  @spec to_binary(t) :: {:ok, binary} | {:error, Error.t()}
  def to_binary(%__MODULE__{ref: ref}) do
    ref |> Native.tensor_to_binary() |> Error.wrap(:to_binary)
  end

  @doc "Like `to_binary/1`, but raises `VivaTensor.Error`."
  @spec to_binary!(t) :: binary
  def to_binary!(tensor), do: Error.bang!(to_binary(tensor))

  @doc """
  The elements as a flat list. Values that no BEAM float can be are the atoms
  `:nan`, `:infinity` and `:neg_infinity`.

      iex> t = VivaTensor.Tensor.from_list!([1, -2], :bf16, [2])
      iex> VivaTensor.Tensor.to_list(t)
      {:ok, [1.0, -2.0]}
  """
  @spec to_list(t) :: {:ok, [number | boolean | atom]} | {:error, Error.t()}
  def to_list(%__MODULE__{ref: ref}) do
    ref |> Native.tensor_to_list() |> Error.wrap(:to_list)
  end

  @doc "Like `to_list/1`, but raises `VivaTensor.Error`."
  @spec to_list!(t) :: [number | boolean | atom]
  def to_list!(tensor), do: Error.bang!(to_list(tensor))

  @doc """
  The same values in a float dtype, each rounded once from f32.

      iex> t = VivaTensor.Tensor.from_list!([1, 2], :i32, [2])
      iex> VivaTensor.Tensor.cast!(t, :bf16)
      #VivaTensor.Tensor<bf16[2]>

      iex> t = VivaTensor.Tensor.from_list!([0.1, -3.3, 1000], :f32, [3])
      iex> t |> VivaTensor.Tensor.cast!(:f8_e4m3) |> VivaTensor.Tensor.to_list!()
      [0.1015625, -3.25, 448.0]
  """
  @spec cast(t, float_dtype) :: {:ok, t} | {:error, Error.t()}
  def cast(%__MODULE__{ref: ref}, dtype) when is_atom(dtype) do
    ref |> Native.tensor_cast(dtype) |> wrap(:cast)
  end

  @doc "Like `cast/2`, but raises `VivaTensor.Error`."
  @spec cast!(t, float_dtype) :: t
  def cast!(tensor, dtype), do: Error.bang!(cast(tensor, dtype))

  @doc """
  Gives up the tensor's memory now instead of when it is garbage collected.
  Calls that already read it finish; later ones fail with `:released`.

      iex> t = VivaTensor.Tensor.from_list!([1], :f32, [1])
      iex> :ok = VivaTensor.Tensor.release(t)
      iex> {:error, error} = VivaTensor.Tensor.to_list(t)
      iex> error.reason
      {:released, %{}}
  """
  @spec release(t) :: :ok
  def release(%__MODULE__{ref: ref}), do: Native.tensor_release(ref)

  @doc false
  def wrap(result, op) do
    with {:ok, %{ref: ref, dtype: dtype, shape: shape}} <- Error.wrap(result, op) do
      {:ok, %__MODULE__{ref: ref, dtype: dtype, shape: shape}}
    end
  end

  # What no dimension can be would be refused by the NIF without a reason.
  defp check(op, dtype, shape) do
    cond do
      not is_atom(dtype) ->
        Error.option(op, "dtype", "expected an atom such as :f32, got #{inspect(dtype)}")

      not (is_list(shape) and Enum.all?(shape, &(is_integer(&1) and &1 >= 0))) ->
        Error.option(op, "shape", "expected a list of sizes, got #{inspect(shape)}")

      Enum.any?(shape, &(&1 > 0x7FFF_FFFF_FFFF_FFFF)) ->
        message = "shape #{inspect(shape)} has more elements than this machine can address"
        {:error, Error.new(op, {:shape_overflow, %{shape: shape}}, message)}

      true ->
        :ok
    end
  end

  defimpl Inspect do
    def inspect(%{dtype: dtype, shape: shape}, _opts) do
      "#VivaTensor.Tensor<#{dtype}[#{Enum.join(shape, ", ")}]>"
    end
  end
end

defmodule VivaTensor.Nx.Type do
  @moduledoc false
  # Nx's types and the dtypes of VivaTensor.Tensor.

  alias VivaTensor.Error

  @types [
    f64: {:f, 64},
    f32: {:f, 32},
    f16: {:f, 16},
    bf16: {:bf, 16},
    f8_e4m3: {:f8_e4m3fn, 8},
    f8_e5m2: {:f, 8},
    i64: {:s, 64},
    i32: {:s, 32},
    i16: {:s, 16},
    i8: {:s, 8},
    u64: {:u, 64},
    u32: {:u, 32},
    u16: {:u, 16},
    u8: {:u, 8}
  ]

  @floats [:f64, :f32, :f16, :bf16, :f8_e4m3, :f8_e5m2]

  @dtypes Map.new(@types, fn {dtype, type} -> {type, dtype} end)

  # As Nx writes them: `:f32` for `{:f, 32}`.
  @names Map.new(@types, fn
           {_, {:f8_e4m3fn, 8} = type} -> {:f8_e4m3fn, type}
           {_, {kind, bits} = type} -> {:"#{kind}#{bits}", type}
         end)

  @doc "The dtype in which elements of an Nx type lie as they are, or the one that they widen to."
  def dtype(_op, {kind, bits}) when kind in [:s, :u] and bits in [2, 4] do
    {:ok, if(kind == :s, do: :i8, else: :u8)}
  end

  def dtype(op, type) do
    with :error <- Map.fetch(@dtypes, type) do
      unsupported(op, name(type), "there is no dtype for Nx's #{name(type)}; #{hint(type)}")
    end
  end

  @doc "The Nx type of a dtype."
  def type(_op, :bool), do: {:ok, {:u, 8}}

  def type(op, dtype) do
    with :error <- Keyword.fetch(@types, dtype) do
      unsupported(op, to_string(dtype), "Nx has no type for #{dtype}; cast the tensor to :f32")
    end
  end

  @doc "The dtype of that name, if Nx has a type for it."
  def named(name), do: Enum.find([:bool | Keyword.keys(@types)], &(to_string(&1) == name))

  @doc "The dtype of the option `type:`, which names a type as Nx's own functions take them."
  def option(_op, nil, default), do: {:ok, default}

  def option(op, option, _default) do
    case Map.fetch(@dtypes, Map.get(@names, option, option)) do
      {:ok, dtype} -> {:ok, dtype}
      :error -> Error.option(op, "type", "expected one of Nx's types, got #{inspect(option)}")
    end
  end

  @doc "That dtype, if it is of floats."
  def float(_op, dtype) when dtype in @floats, do: {:ok, dtype}

  def float(op, dtype) do
    unsupported(op, to_string(dtype), "#{op} takes floats, got #{dtype}; cast with Nx.as_type/2")
  end

  @doc "The elements of a bitstring, a byte each where they are narrower."
  # One size is spelled for each since a variable one is matched as ^size from Elixir 1.20
  # on, and not before.
  def bytes(bits, {:s, 2}), do: for(<<x::signed-2 <- bits>>, into: <<>>, do: <<x>>)
  def bytes(bits, {:s, 4}), do: for(<<x::signed-4 <- bits>>, into: <<>>, do: <<x>>)
  def bytes(bits, {:u, 2}), do: for(<<x::2 <- bits>>, into: <<>>, do: <<x>>)
  def bytes(bits, {:u, 4}), do: for(<<x::4 <- bits>>, into: <<>>, do: <<x>>)
  def bytes(binary, _type), do: binary

  defp name({:f8_e4m3fn, 8}), do: "f8_e4m3fn"
  defp name({kind, bits}), do: "#{kind}#{bits}"

  defp hint({:c, _}), do: "give Nx.real/1 and Nx.imag/1 of it"
  defp hint(_), do: "cast the tensor with Nx.as_type/2"

  defp unsupported(op, dtype, message) do
    {:error, Error.new(op, {:unsupported_dtype, %{op: to_string(op), dtype: dtype}}, message)}
  end
end

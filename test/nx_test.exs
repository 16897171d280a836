alias VivaTensor.Test.Libraries

if Libraries.here?([Nx], VivaTensor.NxTest) do
  defmodule VivaTensor.NxTest do
    # Memory of the whole VM is measured.
    use ExUnit.Case, async: false

    alias VivaTensor.{Error, Packed, Quantized, Tensor}

    @types ~w(f64 f32 f16 bf16 f8_e4m3fn f8 s64 s32 s16 s8 u64 u32 u16 u8)a
    @floats ~w(f64 f32 f16 bf16 f8_e4m3fn f8)a
    @mebibytes 1024 * 1024

    defmodule Layer do
      import Nx.Defn

      defn(dot(x, w), do: VivaTensor.Nx.dot(x, w))
      defn(dot_f64(x, w), do: VivaTensor.Nx.dot!(x, w, type: :f64))

      defn forward(x, w, bias) do
        (x * 2) |> VivaTensor.Nx.dense(w, bias) |> Nx.max(0) |> Nx.sum(axes: [-1])
      end

      defn repeated(x, w) do
        {x, _, _} =
          while {x, i = 0, w}, i < 3 do
            {VivaTensor.Nx.dot(x, w), i + 1, w}
          end

        x
      end
    end

    defp normal(shape, options \\ []) do
      {t, _} = Nx.Random.normal(Nx.Random.key(options[:seed] || 1), 0.0, 1.0, shape: shape)
      t |> Nx.as_type(options[:type] || :f32) |> Nx.rename(options[:names])
    end

    # Equal but for the order in which products are summed.
    defp assert_close(left, right) do
      assert Nx.shape(left) == Nx.shape(right)
      assert Nx.type(left) == Nx.type(right)
      assert Nx.names(left) == Nx.names(right)
      assert left.vectorized_axes == right.vectorized_axes
      assert Nx.all_close(left, right, rtol: 1.0e-4, atol: 1.0e-4) |> all?()
    end

    defp all?(t), do: t |> Nx.devectorize() |> Nx.all() |> Nx.to_number() == 1

    defp reason({:error, %Error{reason: {kind, _}} = error}) do
      assert Exception.message(error) != ""
      kind
    end

    describe "round trips" do
      for type <- @types do
        test "of #{type}" do
          # Numbers that every type has.
          t = Nx.iota({2, 3, 4}, type: :s64) |> Nx.remainder(9) |> Nx.as_type(unquote(type))
          {:ok, tensor} = VivaTensor.Nx.from_nx(t)
          assert tensor.shape == [2, 3, 4]
          assert {:ok, back} = VivaTensor.Nx.to_nx(tensor)
          assert back == t
          assert Tensor.to_list!(tensor) |> Enum.map(&trunc/1) == Enum.map(0..23, &rem(&1, 9))
        end
      end

      for type <- @floats do
        test "of what no number is, in #{type}" do
          specials =
            if unquote(type) == :f8_e4m3fn,
              do: [:nan, -0.0],
              else: [:nan, :infinity, :neg_infinity]

          t = Nx.tensor(specials, type: unquote(type))
          tensor = VivaTensor.Nx.from_nx!(t)
          assert VivaTensor.Nx.to_nx!(tensor) == t
          assert Tensor.to_list!(tensor) == specials
        end
      end

      for {type, wider, values} <- [
            {:s4, :s8, [-8, 7, -1, 0, 3]},
            {:u4, :u8, [0, 15, 7, 8, 1]},
            {:s2, :s8, [-2, 1, -1, 0, 1]},
            {:u2, :u8, [0, 3, 1, 2, 3]}
          ] do
        test "of #{type}, wider" do
          t = Nx.tensor(unquote(values), type: unquote(type))
          tensor = VivaTensor.Nx.from_nx!(t)
          assert Tensor.to_list!(tensor) == unquote(values)
          back = VivaTensor.Nx.to_nx!(tensor)
          assert back == Nx.tensor(unquote(values), type: unquote(wider))
          assert Nx.as_type(back, unquote(type)) == t
        end
      end

      test "of a scalar, names and vectorized axes" do
        assert VivaTensor.Nx.to_nx!(VivaTensor.Nx.from_nx!(Nx.tensor(1.5))) == Nx.tensor(1.5)

        t = Nx.iota({2, 3}, names: [:row, :column])
        tensor = VivaTensor.Nx.from_nx!(t)
        assert VivaTensor.Nx.to_nx!(tensor, names: [:row, :column]) == t
        assert reason(VivaTensor.Nx.to_nx(tensor, names: [:row])) == :invalid_option
        assert reason(VivaTensor.Nx.to_nx(tensor, nmes: [:row])) == :invalid_option

        tensor = t |> Nx.vectorize(:row) |> VivaTensor.Nx.from_nx!()
        assert tensor.shape == [2, 3]
        back = VivaTensor.Nx.to_nx!(tensor, names: [nil, :column]) |> Nx.vectorize(:row)
        assert back == Nx.vectorize(t, :row)
      end

      test "of booleans, as Nx has them" do
        tensor = Tensor.from_list!([true, false], :bool, [2])
        assert VivaTensor.Nx.to_nx!(tensor) == Nx.tensor([1, 0], type: :u8)
      end

      test "Nx takes a tensor for one of its own" do
        tensor = Tensor.from_list!([1, 2, 3], :f32, [3])
        assert Nx.add(tensor, 1) == Nx.tensor([2.0, 3.0, 4.0])
      end
    end

    test "what cannot be is refused by name" do
      for type <- [:c64, :c128] do
        {:error, error} = VivaTensor.Nx.from_nx(Nx.tensor([1], type: type))
        assert error.reason == {:unsupported_dtype, %{op: "from_nx", dtype: to_string(type)}}
        assert Exception.message(error) =~ "Nx.real/1"
      end

      powers = Tensor.from_list!([1, 2], :f8_e8m0, [2])
      assert reason(VivaTensor.Nx.to_nx(powers)) == :unsupported_dtype
      empty = Tensor.from_binary!("", :f32, [0, 2])
      assert reason(VivaTensor.Nx.to_nx(empty)) == :shape_mismatch
      assert reason(VivaTensor.Nx.from_nx([1, 2])) == :invalid_option
      assert reason(VivaTensor.Nx.from_nx(Nx.template({2}, :f32))) == :invalid_option
      assert_raise Error, fn -> VivaTensor.Nx.from_nx!(1.0) end
    end

    describe "memory" do
      # The bytes of binaries and of native memory that are live after a function, and
      # were not before.
      defp grown(fun) do
        before = live()
        kept = fun.()
        {kept, live() - before}
      end

      defp live do
        for pid <- Process.list(), do: :erlang.garbage_collect(pid)
        :erlang.memory(:binary) + VivaTensor.memory_info().native_bytes
      end

      defp binary(bytes), do: :binary.copy(<<1.5::float-32-native>>, div(bytes, 4))

      test "holds a tensor once that comes from Nx, and once that goes back" do
        size = 64 * @mebibytes
        t = size |> binary() |> Nx.from_binary(:f32)
        {tensor, grown} = grown(fn -> VivaTensor.Nx.from_nx!(t) end)
        assert grown < @mebibytes
        {back, grown} = grown(fn -> VivaTensor.Nx.to_nx!(tensor) end)
        assert grown < @mebibytes
        assert Nx.to_binary(back) == Nx.to_binary(t)
      end

      test "holds a part of a binary once" do
        size = 64 * @mebibytes
        <<_::binary-size(4096), part::binary-size(4096), _::binary>> = binary(size)
        whole = live()
        t = part |> Nx.from_binary(:f32) |> Nx.reshape({32, 32})
        tensor = VivaTensor.Nx.from_nx!(t)
        back = VivaTensor.Nx.to_nx!(tensor)
        assert back == t
        assert live() - whole < @mebibytes
      end

      test "holds a result once" do
        size = 64 * @mebibytes
        t = size |> binary() |> Nx.from_binary(:f32) |> Nx.reshape({4096, 4096})
        q = VivaTensor.Nx.quantize!(t, :int8)
        {back, grown} = grown(fn -> VivaTensor.Nx.dequantize!(q) end)
        assert_in_delta grown, size, @mebibytes
        {y, grown} = grown(fn -> VivaTensor.Nx.dot!(t, q) end)
        assert_in_delta grown, size, @mebibytes
        # All of them are held until here.
        assert Enum.map([t, back, y], &Nx.shape/1) == List.duplicate({4096, 4096}, 3)
        assert q.shape == [4096, 4096]
      end
    end

    describe "quantize" do
      test "is that of VivaTensor" do
        t = normal({16, 64}, names: [:out, :in])
        {:ok, q} = VivaTensor.Nx.quantize(t, :nf4, double_quant: true)
        same = t |> VivaTensor.Nx.from_nx!() |> VivaTensor.quantize!(:nf4, double_quant: true)
        assert Quantized.dump!(q) == Quantized.dump!(same)

        back = VivaTensor.Nx.dequantize!(q, names: [:out, :in])
        assert Nx.names(back) == [:out, :in]

        assert back |> VivaTensor.Nx.from_nx!() |> Tensor.to_binary!() ==
                 same |> VivaTensor.dequantize!() |> Tensor.to_binary!()

        assert {:bf, 16} = q |> VivaTensor.Nx.dequantize!(type: :bf16) |> Nx.type()
        assert {:f, 16} = q |> VivaTensor.Nx.dequantize!(type: {:f, 16}) |> Nx.type()
        assert reason(VivaTensor.Nx.dequantize(q, type: :f33)) == :invalid_option
        assert reason(VivaTensor.Nx.dequantize(q, type: :s8)) == :unsupported_dtype
      end

      test "looks at activations that Nx holds" do
        t = normal({32, 128})
        {:ok, q} = VivaTensor.Nx.quantize(t, :int4, method: :gptq, activations: normal({32, 128}))
        assert q.format == :int4
      end

      test "takes one weight, of floats" do
        t = normal({2, 4, 32})
        assert reason(VivaTensor.Nx.quantize(Nx.vectorize(t, :layer), :nf4)) == :invalid_option
        assert reason(VivaTensor.Nx.quantize(Nx.iota({2, 4}), :int8)) == :unsupported_dtype
        assert reason(VivaTensor.Nx.quantize(t, :nope)) == :unknown_format
      end
    end

    describe "products" do
      setup do
        w = normal({48, 64}, seed: 2)
        %{w: w, q: VivaTensor.Nx.quantize!(w, :int4, block_size: 32), bias: normal({48}, seed: 3)}
      end

      # What a product is.
      defp reference(x, q), do: Nx.dot(x, [-1], VivaTensor.Nx.dequantize!(q), [1])

      for format <- [:int8, :int2, :nf4, :fp8_e4m3, :mxfp4, :q4_0] do
        test "of #{format} are those with dequantized weights, traced or not", c do
          q = VivaTensor.Nx.quantize!(c.w, unquote(format))
          x = normal({5, 64})
          expected = reference(x, q)
          assert_close(VivaTensor.Nx.dot!(x, q), expected)
          assert_close(Layer.dot(x, q), expected)
          assert Layer.dot(x, q) == VivaTensor.Nx.dot!(x, q)
        end
      end

      test "keep axes before the last, and what they are called", c do
        for shape <- [{64}, {1, 64}, {2, 3, 64}] do
          names = Enum.take([:batch, :position], tuple_size(shape) - 1) ++ [:feature]
          x = normal(shape, names: names)

          expected = reference(x, c.q)

          assert_close(VivaTensor.Nx.dot!(x, c.q), expected)
          assert_close(Layer.dot(x, c.q), expected)
        end
      end

      test "are done for each of vectorized axes", c do
        x = normal({2, 3, 5, 64}, names: [nil, nil, :position, nil]) |> Nx.vectorize([:a, :b])
        expected = reference(x, c.q)
        assert expected.vectorized_axes == [a: 2, b: 3]
        assert_close(VivaTensor.Nx.dot!(x, c.q), expected)
        assert_close(Layer.dot(x, c.q), expected)
      end

      for type <- @floats do
        test "of #{type} are of that type", c do
          x = normal({4, 64}, type: unquote(type))
          y = VivaTensor.Nx.dot!(x, c.q)
          assert Nx.type(y) == Nx.type(x)
          assert Layer.dot(x, c.q) == y
          assert {:f, 64} = Nx.type(VivaTensor.Nx.dot!(x, c.q, type: :f64))
          assert Layer.dot_f64(x, c.q) == VivaTensor.Nx.dot!(x, c.q, type: :f64)
        end
      end

      test "have a bias in a dense layer", c do
        x = normal({5, 64}, names: [:row, nil])
        expected = Nx.add(reference(x, c.q), c.bias)
        assert_close(VivaTensor.Nx.dense!(x, c.q, c.bias), expected)
        forward = Nx.multiply(x, 2) |> reference(c.q) |> Nx.add(c.bias) |> Nx.max(0)
        assert_close(Layer.forward(x, c.q, c.bias), Nx.sum(forward, axes: [-1]))
      end

      test "are in a loop, in a closure and of packed weights", c do
        square = VivaTensor.Nx.quantize!(normal({64, 64}), :int8)
        x = normal({2, 64})
        thrice = x |> reference(square) |> reference(square) |> reference(square)

        assert Nx.all_close(Layer.repeated(x, square), thrice, rtol: 1.0e-3, atol: 1.0e-2)
               |> all?()

        closed = Nx.Defn.jit(fn x -> VivaTensor.Nx.dot!(x, c.q) end)
        assert closed.(x) == VivaTensor.Nx.dot!(x, c.q)

        packed = VivaTensor.prepack!(c.q)
        assert Layer.dot(x, packed) == VivaTensor.Nx.dot!(x, packed)
        assert VivaTensor.Nx.dot!(x, c.q, compute: :int8) == VivaTensor.Nx.dot!(x, packed)
      end

      test "have gradients, which go through the weight", c do
        w = VivaTensor.Nx.dequantize!(c.q)

        for x <- [normal({5, 64}, names: [:row, nil]), normal({2, 3, 64}), normal({64})] do
          loss = fn x, bias, dense -> x |> Nx.sin() |> dense.(bias) |> Nx.pow(2) |> Nx.sum() end
          ours = &VivaTensor.Nx.dense!(&1, c.q, &2)
          theirs = fn x, bias -> x |> Nx.dot([-1], w, [1]) |> Nx.add(bias) end
          gradients = Nx.Defn.grad({x, c.bias}, fn {x, bias} -> loss.(x, bias, ours) end)
          expected = Nx.Defn.grad({x, c.bias}, fn {x, bias} -> loss.(x, bias, theirs) end)
          assert_close(elem(gradients, 0), elem(expected, 0))
          assert_close(elem(gradients, 1), elem(expected, 1))

          # What is not traced has none.
          alone = Nx.Defn.grad(x, &loss.(&1, c.bias, ours))
          assert_close(alone, elem(expected, 0))
        end

        x = {2, 5, 64} |> normal() |> Nx.vectorize(:batch)
        sum = fn y -> y |> Nx.pow(2) |> Nx.sum() end
        gradient = Nx.Defn.grad(x, &sum.(VivaTensor.Nx.dot!(&1, c.q)))
        assert_close(gradient, Nx.Defn.grad(x, &sum.(Nx.dot(&1, [-1], w, [1]))))

        packed = VivaTensor.prepack!(c.q)

        assert_raise Error, ~r/no gradient goes through packed/, fn ->
          Nx.Defn.grad(normal({64}), &sum.(VivaTensor.Nx.dot!(&1, packed)))
        end
      end

      test "that cannot be are refused while they are traced, and alike outside", c do
        x = normal({2, 64})

        for {kind, x, w, options} <- [
              {:shape_mismatch, normal({2, 32}), c.q, []},
              {:shape_mismatch, Nx.tensor(1.0), c.q, []},
              {:shape_mismatch, x, VivaTensor.Nx.quantize!(normal({2, 2, 64}), :int8), []},
              {:unsupported_dtype, Nx.iota({2, 64}), c.q, []},
              {:unsupported_dtype, Nx.as_type(x, :c64), c.q, []},
              {:unsupported_dtype, x, c.q, [type: :s8]},
              {:invalid_option, x, c.q, [type: :f33]},
              {:invalid_option, x, c.q, [typ: :f32]},
              {:invalid_option, x, c.w, []}
            ] do
          {:error, error} = VivaTensor.Nx.dot(x, w, options)
          assert {^kind, _} = error.reason
          assert error.op == :dot

          traced =
            assert_raise Error, fn ->
              Nx.Defn.debug_expr(fn x -> VivaTensor.Nx.dot!(x, w, options) end).(x)
            end

          assert traced.reason == error.reason
        end

        for bias <- [
              normal({47}),
              normal({1, 48}),
              Nx.vectorize(normal({2, 48}), :a),
              Nx.iota({48}),
              1
            ] do
          {:error, error} = VivaTensor.Nx.dense(x, c.q, bias)
          assert error.op == :dense

          assert_raise Error, Exception.message(error), fn ->
            Nx.Defn.debug_expr(fn x -> VivaTensor.Nx.dense!(x, c.q, bias) end).(x)
          end
        end

        {:error, %{op: :dot}} = VivaTensor.Nx.dot(x, c.q, compute: :llm_int8)
        assert reason(VivaTensor.Nx.dot([1], c.q)) == :invalid_option
      end

      test "are the only use of values inside defn", _c do
        assert_raise Error, ~r/inside defn\s+use dot\/3/, fn ->
          Nx.Defn.jit_apply(fn x -> VivaTensor.Nx.quantize!(x, :int8) end, [normal({2, 32})])
        end
      end
    end

    test "a quantized weight is a container without tensors" do
      q = VivaTensor.Nx.quantize!(normal({4, 64}), :nf4)
      assert Nx.backend_transfer(%{w: q}) == %{w: q}
      [loaded] = {q} |> Nx.serialize() |> Nx.deserialize() |> Tuple.to_list()
      assert Quantized.dump!(loaded) == Quantized.dump!(q)
      %Packed{} = packed = VivaTensor.prepack!(q)
      assert_raise ArgumentError, ~r/one machine/, fn -> Nx.serialize({packed}) end
    end
  end
else
  defmodule VivaTensor.NoNxTest do
    use ExUnit.Case, async: true

    test "without Nx, the error says what to add" do
      t = VivaTensor.Tensor.from_list!([1, 2], :f32, [1, 2])
      {:error, error} = VivaTensor.Nx.to_nx(t)
      assert error.reason == {:missing_library, %{library: "nx"}}
      assert Exception.message(error) =~ "{:nx, "
      {:error, error} = t |> VivaTensor.quantize!(:int8) |> VivaTensor.Nx.dequantize()
      assert error.reason == {:missing_library, %{library: "nx"}}
      {:error, error} = VivaTensor.Nx.from_nx(1)
      assert {:invalid_option, _} = error.reason
    end
  end
end

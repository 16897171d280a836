alias VivaTensor.Test.Libraries

if Libraries.here?([Axon], VivaTensor.NxAxonTest) do
  defmodule VivaTensor.NxAxonTest do
    # Memory of the whole VM is measured.
    use ExUnit.Case, async: false

    alias VivaTensor.Error

    defp model do
      Axon.input("x", shape: {nil, 64})
      |> Axon.dense(128, activation: :relu)
      |> Axon.layer_norm()
      |> Axon.dense(96, name: "middle")
      |> Axon.dense(32, use_bias: false)
    end

    defp built(model, template \\ Nx.template({1, 64}, :f32)) do
      {init, _} = Axon.build(model)
      init.(template, Axon.ModelState.empty())
    end

    defp normal(shape), do: 7 |> Nx.Random.key() |> Nx.Random.normal(shape: shape) |> elem(0)

    # The state with the kernels that a quantized model computes with.
    defp dequantized(state, names, format, options \\ []) do
      Enum.reduce(names, state, fn name, state ->
        round = fn kernel ->
          kernel
          |> Nx.transpose()
          |> VivaTensor.Nx.quantize!(format, options)
          |> VivaTensor.Nx.dequantize!()
          |> Nx.transpose()
        end

        update_in(state, [Access.key!(:data), name, "kernel"], round)
      end)
    end

    defp assert_close(left, right) do
      assert Nx.type(left) == Nx.type(right)
      assert left |> Nx.all_close(right, rtol: 1.0e-3, atol: 1.0e-3) |> Nx.to_number() == 1
    end

    @all ["dense_0", "middle", "dense_2"]

    for {format, options} <- [int8: [], nf4: [double_quant: true], int4: [block_size: 32]] do
      test "a model computes with kernels of #{format}" do
        model = model()
        state = built(model)
        x = normal({5, 64})

        expected =
          Axon.predict(model, dequantized(state, @all, unquote(format), unquote(options)), x)

        {:ok, {quantized, rest}} =
          VivaTensor.Axon.quantize_model(model, state, unquote(format), unquote(options))

        assert_close(Axon.predict(quantized, rest, x), expected)
        assert Axon.properties(quantized) == Axon.properties(model)

        for name <- @all do
          refute rest.data |> Map.get(name, %{}) |> Map.has_key?("kernel")
          refute "kernel" in rest.parameters[name]
        end

        # What is left can still be frozen and saved.
        assert %Axon.ModelState{} = Axon.ModelState.freeze(rest)

        assert Axon.predict(quantized, rest |> Nx.serialize() |> Nx.deserialize(), x) ==
                 Axon.predict(quantized, rest, x)
      end
    end

    test "kernels are held quantized, and nowhere else" do
      model =
        Axon.input("x", shape: {nil, 256})
        |> Axon.dense(2048, name: "up", kernel_initializer: :ones)

      {x, state} = {normal({2, 256}), built(model, Nx.template({1, 256}, :f32))}
      dense = Nx.byte_size(state.data["up"]["kernel"])
      {quantized, rest} = VivaTensor.Axon.quantize_model!(model, state, :nf4)
      assert rest.data |> Map.fetch!("up") |> Map.keys() == ["bias"]
      before = live()
      y = Axon.predict(quantized, rest, x)
      assert Nx.shape(y) == {2, 2048}
      assert live() - before < div(dense, 8)
    end

    defp live do
      for pid <- Process.list(), do: :erlang.garbage_collect(pid)
      :erlang.memory(:binary) + VivaTensor.memory_info().native_bytes
    end

    test "layers are chosen by their names" do
      model = model()
      state = built(model)
      x = normal({3, 64})

      for {options, names} <- [
            {[include: "^dense_"], ["dense_0", "dense_2"]},
            {[exclude: ~r/^dense_2$/], ["dense_0", "middle"]},
            {[include: "dense", exclude: "0"], ["dense_2"]}
          ] do
        {quantized, rest} = VivaTensor.Axon.quantize_model!(model, state, :int8, options)
        assert for({name, %{"kernel" => _}} <- rest.data, do: name) == Enum.sort(@all -- names)
        expected = Axon.predict(model, dequantized(state, names, :int8), x)
        assert_close(Axon.predict(quantized, rest, x), expected)
      end
    end

    test "the arithmetic is chosen, and the policy kept" do
      model = model()
      state = built(model)
      x = normal({8, 64})
      {quantized, rest} = VivaTensor.Axon.quantize_model!(model, state, :int8, compute: :int8)
      near = Axon.predict(quantized, rest, x)
      exact = Axon.predict(model, dequantized(state, @all, :int8), x)
      refute near == exact
      error = Nx.divide(Nx.LinAlg.norm(Nx.subtract(near, exact)), Nx.LinAlg.norm(exact))
      assert Nx.to_number(error) < 0.05

      policy = Axon.MixedPrecision.create_policy(compute: {:bf, 16}, output: {:bf, 16})
      half = Axon.MixedPrecision.apply_policy(model, policy)
      {quantized, rest} = VivaTensor.Axon.quantize_model!(half, state, :int8)
      assert quantized |> Axon.predict(rest, x) |> Nx.type() == {:bf, 16}
    end

    test "what is left is trained as it would be with those kernels" do
      model = model()
      state = built(model)
      x = normal({3, 64})

      gradients = fn model, state ->
        {_init, predict} = Axon.build(model)
        Nx.Defn.grad(state, fn state -> state |> predict.(x) |> Nx.pow(2) |> Nx.sum() end).data
      end

      {quantized, rest} = VivaTensor.Axon.quantize_model!(model, state, :int8)
      expected = gradients.(model, dequantized(state, @all, :int8))

      for {layer, parameters} <- gradients.(quantized, rest), {name, gradient} <- parameters do
        assert_close(gradient, expected[layer][name])
      end
    end

    test "integers come in as floats" do
      model = Axon.input("x", shape: {nil, 32}) |> Axon.dense(8)
      x = Nx.iota({2, 32})
      state = built(model, Nx.template({1, 32}, :s32))
      {quantized, rest} = VivaTensor.Axon.quantize_model!(model, state, :int8)
      expected = Axon.predict(model, dequantized(state, ["dense_0"], :int8), x)
      assert_close(Axon.predict(quantized, rest, x), expected)
    end

    test "what cannot be is said" do
      model = model()
      state = built(model)
      quantize = &VivaTensor.Axon.quantize_model(model, state, &1, &2)

      assert {:error, %Error{reason: {:invalid_option, _}} = error} =
               quantize.(:int8, include: "no")

      assert Exception.message(error) =~ "dense_0, middle, dense_2"
      assert {:error, %Error{reason: {:invalid_option, _}}} = quantize.(:int8, include: "(")
      assert {:error, %Error{reason: {:invalid_option, _}}} = quantize.(:int8, exclude: 1)
      assert {:error, %Error{reason: {:invalid_option, _}}} = quantize.(:int8, 1)
      assert {:error, %Error{reason: {:unknown_format, _}}} = quantize.(:int9, [])
      assert {:error, %Error{reason: {:indivisible, _}} = error} = quantize.(:q4_k, [])
      assert Exception.message(error) =~ "layer dense_0: "
      {:error, error} = VivaTensor.Axon.quantize_model(model, %{}, :int8)
      assert Exception.message(error) =~ "Axon.ModelState"
      {:error, error} = VivaTensor.Axon.quantize_model(%{}, state, :int8)
      assert Exception.message(error) =~ "Axon model"
      assert_raise Error, fn -> VivaTensor.Axon.quantize_model!(model, state, :int9) end
    end
  end
end

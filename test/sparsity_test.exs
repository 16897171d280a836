defmodule VivaTensor.SparsityTest do
  use ExUnit.Case, async: true

  alias VivaTensor.{Calibration, Error, Tensor}

  # Neighbouring columns are correlated, as those of a model are.
  defp random([rows, columns] = shape, seed) do
    :rand.seed(:exsss, seed)

    values =
      for _ <- 1..rows do
        noise = Enum.scan(for(_ <- 1..columns, do: :rand.normal()), &(&1 + 0.8 * &2))
        for {v, c} <- Enum.with_index(noise, 1), do: v * (0.1 + 5 / rem(c * 37, columns + 1))
      end

    Tensor.from_list!(List.flatten(values), :f32, shape)
  end

  setup_all do
    w = Tensor.from_list!(for(i <- 1..8192, do: :math.sin(i * i)), :f32, [64, 128])
    %{w: w, seen: random([256, 128], 1), unseen: random([128, 128], 2)}
  end

  # Of the layer's output, in decibels below it.
  defp error(w, q, x) do
    exact = VivaTensor.matmul!(x, VivaTensor.quantize!(w, :int8))
    VivaTensor.metrics!(exact, VivaTensor.matmul!(x, q)).sqnr_db
  end

  defp zeros?(tensor_or_list) do
    tensor_or_list
    |> Tensor.to_list!()
    |> Enum.chunk_every(4)
    |> Enum.all?(fn group -> Enum.count(group, &(&1 == 0.0)) >= 2 end)
  end

  test "the more a method sees the less the output loses", c do
    [magnitude, wanda, sparsegpt] =
      for options <- [[], [method: :wanda], [method: :sparsegpt]] do
        options = if options == [], do: [], else: [activations: c.seen] ++ options
        sparse = VivaTensor.sparsify!(c.w, options)
        assert zeros?(sparse)
        q = VivaTensor.quantize!(sparse, :sparse24)
        assert Tensor.to_binary!(VivaTensor.dequantize!(q)) == Tensor.to_binary!(sparse)
        error(c.w, q, c.unseen)
      end

    assert wanda > magnitude + 1 and sparsegpt > wanda + 0.5
  end

  test "one pass prunes and rounds", c do
    [magnitude, wanda, sparsegpt] =
      for sparsity <- [:magnitude, :wanda, :sparsegpt] do
        options = [method: :gptq, sparsity: sparsity, activations: c.seen]
        q = VivaTensor.quantize!(c.w, :int4, options)
        assert zeros?(VivaTensor.dequantize!(q))
        error(c.w, q, c.unseen)
      end

    assert wanda > magnitude and sparsegpt > magnitude + 1
  end

  test "one pass into sparse24 is one pass into its values", c do
    options = [method: :gptq, sparsity: :sparsegpt, activations: c.seen]
    q = VivaTensor.quantize!(c.w, :sparse24, [values: :int8] ++ options)
    dense = VivaTensor.quantize!(c.w, :int8, options)
    [a, b] = for q <- [q, dense], do: q |> VivaTensor.dequantize!() |> Tensor.to_list!()
    assert a == b
    # Half the codes, and a bit a weight.
    assert_in_delta dense.bits_per_weight - q.bits_per_weight, 3.0, 0.01
  end

  test "integers keep the zeros of a sparse tensor", c do
    sparse = VivaTensor.sparsify!(c.w, method: :sparsegpt, activations: c.seen)

    for format <- [:int8, :int4, :int3, :int2], symmetric <- [true, false] do
      q = VivaTensor.quantize!(sparse, format, symmetric: symmetric)
      assert zeros?(VivaTensor.dequantize!(q)), inspect({format, symmetric})
    end
  end

  test "a calibration does what its activations do, in the dtype of the tensor", c do
    calibration = Calibration.new()
    :ok = Calibration.add(calibration, "a.q_proj", c.seen)
    w = Tensor.cast!(c.w, :bf16)

    for method <- [:wanda, :sparsegpt] do
      [a, b] =
        for seen <- [[activations: c.seen], [activations: calibration, layer: "a.q_proj"]] do
          sparse = VivaTensor.sparsify!(w, [method: method] ++ seen)
          assert {sparse.dtype, sparse.shape} == {:bf16, [64, 128]}
          Tensor.to_binary!(sparse)
        end

      assert a == b
    end
  end

  test "what cannot be done says why", c do
    seen = [activations: c.seen]

    for {options, option} <- [
          {[method: :wanda], "activations"},
          {[method: :sparsegpt, layer: "a"], "activations"},
          {[method: :sparsegpt, damping: 2.0] ++ seen, "damping"},
          {[method: :wanda, damping: 0.1] ++ seen, "damping"},
          {[method: :wanda, scores: c.w] ++ seen, "scores"},
          {[method: :obs] ++ seen, "activations"},
          {[method: :obs], "method"},
          {[scores: nil], "scores"}
        ] do
      assert {:error, %Error{op: :sparsify, reason: reason}} = VivaTensor.sparsify(c.w, options)
      assert {:invalid_option, %{option: ^option}} = reason
    end

    for {options, option} <- [
          {[method: :gptq, sparsity: :wanda, zero_point: :float], "zero_point"},
          {[method: :gptq, sparsity: :wanda, order: :activation], "order"},
          {[method: :gptq, sparsity: :half], "sparsity"},
          {[method: :awq, sparsity: :wanda], "sparsity"}
        ] do
      assert {:error, %Error{reason: reason}} = VivaTensor.quantize(c.w, :int4, options ++ seen)
      assert {:invalid_option, %{option: ^option}} = reason
    end

    for {options, option} <- [
          {[values: :int8], "sparsity"},
          {[values: :bf16, sparsity: :sparsegpt], "values"}
        ] do
      options = [method: :gptq] ++ options ++ seen
      assert {:error, %Error{reason: reason}} = VivaTensor.quantize(c.w, :sparse24, options)
      assert {:invalid_option, %{option: ^option}} = reason
    end

    nan = Tensor.from_list!(List.duplicate(:nan, 128), :f32, [1, 128])
    narrow = Tensor.from_list!(for(_ <- 1..4, do: 1.0), :f32, [1, 4])
    wide = Tensor.from_list!(for(_ <- 1..6, do: 1.0), :f32, [1, 6])

    for {w, x, kind} <- [
          {c.w, nan, :non_finite},
          {c.w, narrow, :shape_mismatch},
          {wide, wide, :indivisible}
        ] do
      options = [method: :sparsegpt, activations: x]
      assert {:error, %Error{reason: reason}} = VivaTensor.sparsify(w, options)
      assert elem(reason, 0) == kind
    end
  end
end

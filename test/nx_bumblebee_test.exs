alias VivaTensor.Test.Libraries

if Libraries.here?([Nx], VivaTensor.NxBumblebeeTest) do
  defmodule VivaTensor.NxBumblebeeTest do
    use ExUnit.Case, async: false

    alias VivaTensor.{Bumblebee, Checkpoint, Error, Job, Tensor}
    alias VivaTensor.Test.Directory

    @model "examples/models/viva-tiny"
    @weight "model.layers.0.mlp.up_proj.weight"

    # A format that each layout writes.
    @layouts [
      bitsandbytes: :nf4,
      awq: :int4,
      gptq: :int3,
      gptq_v2: :int4,
      "compressed-tensors": :fp8_e4m3,
      mlx: :int4
    ]

    defp quantize!(options) do
      to = Path.join(Directory.create!(), "model")
      {:ok, job} = Job.start([source: @model, to: to] ++ options)
      {:ok, _report} = Job.await(job)
      to
    end

    for {layout, format} <- @layouts do
      test "reads #{format} in the layout #{layout} by the names of the model" do
        dir = quantize!(format: unquote(format), layout: unquote(layout))
        checkpoint = Checkpoint.open!(dir)
        read = Bumblebee.safetensors_reader(Path.join(dir, "model.safetensors"))
        names = for entry <- Checkpoint.open!(@model).entries, do: entry.name
        assert read |> Map.keys() |> Enum.sort() == Enum.sort(names)

        for {name, weight} <- read do
          expected =
            case Checkpoint.get!(checkpoint, name) do
              %Tensor{} = tensor -> VivaTensor.Nx.to_nx!(tensor)
              quantized -> VivaTensor.Nx.dequantize!(quantized, type: :f32)
            end

          assert Nx.to_tensor(weight) == expected
        end

        assert {:f, 32} = Nx.type(read[@weight])
      end
    end

    test "reads one weight at a time, in the type that it is asked for" do
      dir = quantize!(format: :nf4)
      path = Path.join(dir, "model.safetensors")
      before = VivaTensor.memory_info().native_bytes
      read = Bumblebee.safetensors_reader(path, type: :bf16)
      for {_, weight} <- read, do: Nx.to_tensor(weight)
      assert VivaTensor.memory_info().native_bytes <= before
      assert {:bf, 16} = Nx.type(read[@weight])
      assert inspect(read[@weight]) =~ "up_proj.weight bf16["

      assert_raise Error, ~r/type: expected/, fn ->
        Bumblebee.safetensors_reader(path, type: :f33)
      end

      assert_raise Error, fn -> Bumblebee.safetensors_reader(Path.join(dir, "absent")) end
    end

    test "tells each weight of several files once, and reads a file alone" do
      dir = quantize!(format: :nf4, max_shard_size: 400_000)
      files = Path.wildcard(Path.join(dir, "*.safetensors"))
      assert length(files) > 1
      parts = Enum.map(files, &Bumblebee.safetensors_reader/1)
      names = for entry <- Checkpoint.open!(@model).entries, do: entry.name
      assert parts |> Enum.flat_map(&Map.keys/1) |> Enum.sort() == Enum.sort(names)

      # As Hugging Face's cache has it: without the ending, beside nothing else.
      alone = Path.join(Directory.create!(), "0123abcd")
      File.cp!(hd(files), alone)
      read = Bumblebee.safetensors_reader(alone)
      assert Map.keys(read) == Map.keys(hd(parts))

      for {name, weight} <- read,
          do: assert(Nx.to_tensor(weight) == Nx.to_tensor(hd(parts)[name]))
    end

    describe "Bumblebee" do
      # Not VivaTensor's, which has an alias here.
      reason = Libraries.absent([:"Elixir.Bumblebee"], "Bumblebee in #{inspect(__MODULE__)}")
      if reason, do: @describetag(skip: reason)

      test "loads a quantized checkpoint as one that was dequantized" do
        model = Path.join(Directory.create!(), "viva-tiny")
        File.cp_r!(@model, model)
        dir = quantize!(format: :nf4, layout: :bitsandbytes)
        plain = Path.join(Directory.create!(), "plain")
        {:ok, job} = Job.start(source: dir, to: plain, convert: :plain, dtype: :f32)
        {:ok, _} = Job.await(job)

        for {quantized, dense} <- [{dir, plain}, {model, model}] do
          ours = load!(quantized, safetensors_reader: &Bumblebee.safetensors_reader/1).params
          assert ours == load!(dense, []).params

          # It is the checkpoint's and not what a model begins with.
          kernel = dense |> read!(@weight) |> Nx.transpose()

          assert Enum.any?(ours.data, fn {_layer, parameters} ->
                   parameters["kernel"] == kernel
                 end)
        end
      end

      test "runs a model with quantized layers" do
        model = Path.join(Directory.create!(), "viva-tiny")
        File.cp_r!(@model, model)
        %{model: model, params: state} = load!(model, [])
        {quantized, rest} = VivaTensor.Axon.quantize_model!(model, state, :int8)
        inputs = %{"input_ids" => Nx.tensor([[1, 17, 42, 99, 5, 300]])}
        expected = apply(Axon, :predict, [model, state, inputs]).logits
        logits = apply(Axon, :predict, [quantized, rest, inputs]).logits
        assert Nx.shape(logits) == Nx.shape(expected)
        error = Nx.divide(norm(Nx.subtract(logits, expected)), norm(expected))
        assert Nx.to_number(error) < 0.05
      end

      defp norm(t), do: t |> Nx.pow(2) |> Nx.sum() |> Nx.sqrt()

      defp read!(dir, name) do
        tensor = dir |> Checkpoint.open!() |> Checkpoint.get!(name)
        tensor |> Tensor.cast!(:f32) |> VivaTensor.Nx.to_nx!()
      end

      # A model, which has no token to pad with, as Bumblebee wants one.
      defp load!(dir, options) do
        config = Path.join(dir, "config.json")
        text = config |> File.read!() |> String.replace(~r/("pad_token_id"): null/, "\\1: 0")
        File.write!(config, text)
        {:ok, loaded} = apply(:"Elixir.Bumblebee", :load_model, [{:local, dir}, options])
        loaded
      end
    end
  end
end

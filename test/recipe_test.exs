defmodule VivaTensor.RecipeTest do
  use ExUnit.Case, async: true

  alias VivaTensor.{Calibration, Error, Recipe}

  doctest VivaTensor.Recipe

  defp recipe(opts \\ []) do
    {:ok, recipe} = Recipe.new(Keyword.merge([format: :nf4], opts))
    recipe
  end

  defp entry(name, shape \\ [256, 256], dtype \\ "bf16") do
    %{name: name, shape: shape, dtype: dtype}
  end

  describe "new/1" do
    test "completes layout and settings" do
      recipe = recipe(double_quant: true)
      assert recipe.layout == :bitsandbytes
      assert recipe.settings.double_quant == true
      assert recipe(format: :int4).layout == :awq
    end

    test "names the field that is wrong" do
      for {opts, option} <- [
            {[format: nil], "format"},
            {[format: "nf4"], "format"},
            {[include: "("], "include"},
            {[exclude: [~r/ok/, 7]], "exclude"},
            {[min_elements: -1], "min_elements"},
            {[non_finite: :ignore], "non_finite"},
            {[statistics: "seen.safetensors"], "statistics"},
            {[method: :gptq, statistics: 7], "statistics"},
            {[method: :gptq, damping: 2], "damping"},
            {[method: :awq, damping: 0.1], "damping"},
            {[method: :awq, duo_scaling: :none], "duo_scaling"},
            {[method: :gptq, duo_scaling: true], "duo_scaling"},
            {[method: :awq, scales: :best], "method"},
            {[method: :awd], "method"},
            {[block_sizes: 64], "block_sizes"},
            {[block_size: 63], "block_size"}
          ] do
        assert {:error,
                %Error{op: :recipe, reason: {:invalid_option, %{option: ^option}}} = error} =
                 Recipe.new(Keyword.merge([format: :nf4], opts))

        assert Exception.message(error) =~ option
      end
    end

    test "completes methods that look at activations" do
      recipe = recipe(method: :awq_gptq, scales: :mse, damping: 0.05)
      assert recipe.calibrated

      assert %{method: :awq_gptq, scales: :mse, damping: 0.05, order: :natural} = recipe.settings

      assert %{clip: true, duo_scaling: false} = recipe(method: :awq).settings

      for duo <- [true, :both] do
        assert recipe(method: :awq_gptq, duo_scaling: duo).settings.duo_scaling == duo
      end

      refute recipe(method: :mse).calibrated

      assert {:error, %Error{reason: {:layout_mismatch, %{layout: "bitsandbytes"}}}} =
               Recipe.new(format: :nf4, method: :awq, rotate: true)

      assert {:error, %Error{reason: {:invalid_option, %{option: "method"}}}} =
               Recipe.new(format: :q4_k, method: :gptq)
    end

    test "knows presets, whose options give way to those beside them" do
      for %{name: name, about: about, options: options} <- Recipe.presets() do
        assert {:ok, recipe} = Recipe.new(name)
        assert recipe == Recipe.new!(options)
        assert recipe.format == options[:format]
        refute about =~ ~r/[.:]$/
      end

      recipe = Recipe.new!(:gptq, format: :int3, exclude: "lm_head")
      assert {recipe.format, recipe.layout, recipe.settings.symmetric} == {:int3, :gptq, false}
      assert [%Regex{}] = recipe.exclude
      assert recipe.settings.scales == :mse
      assert Recipe.new!(:gptq, method: :rtn).settings.method == :rtn

      assert {:error, %Error{reason: {:unknown_recipe, %{name: "nf5", known: known}}}} =
               Recipe.new(:nf5)

      assert known =~ "nf4"
      assert_raise Error, ~r/unknown recipe :nf5/, fn -> Recipe.new!(:nf5) end
    end

    test "prints as what makes it again" do
      for recipe <- [
            recipe(),
            recipe(block_size: 128, double_quant: true, include: "lm_head", non_finite: :keep),
            Recipe.new!(:gptq, statistics: "seen.safetensors", damping: 0.02, min_elements: 0)
          ] do
        {again, _} = Code.eval_string(inspect(recipe))
        assert inspect(again) == inspect(recipe)

        assert Map.drop(Map.from_struct(again), [:include]) ==
                 Map.drop(Map.from_struct(recipe), [:include])
      end

      {:ok, recipe} = Recipe.with_statistics(Recipe.new!(:awq), Calibration.new())
      assert inspect(recipe) =~ "statistics: "
      assert %{statistics: "in memory", settings: %{method: :awq}} = Recipe.to_map(recipe)
    end

    test "refuses formats and layouts that are not there" do
      assert {:error, %Error{reason: {:unknown_format, %{name: "nf5"}}}} =
               Recipe.new(format: :nf5)

      assert {:error, %Error{reason: {:unknown_layout, %{name: "zip"}}}} =
               Recipe.new(format: :nf4, layout: :zip)

      assert {:error, %Error{reason: {:layout_mismatch, _}}} =
               Recipe.new(format: :nf4, layout: :awq)
    end
  end

  describe "decide/3" do
    test "quantizes the weights of linear layers" do
      for name <- [
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.0.mlp.gate_proj.weight",
            "encoder.layer.3.attention.output.dense.weight",
            "transformer.h.0.mlp.dense_h_to_4h.weight",
            "encoder.block.0.layer.1.DenseReluDense.wo.weight",
            "weight"
          ] do
        assert Recipe.decide(recipe(), entry(name)) == :quantize
      end

      for dtype <- ~w(f64 f32 f16 bf16) do
        assert Recipe.decide(recipe(), entry("a.weight", [64, 64], dtype)) == :quantize
      end
    end

    test "keeps everything else, and says why" do
      for {entry, reason} <- [
            {entry("model.embed_tokens.weight"), "embedding"},
            {entry("embeddings.position_embeddings.weight"), "embedding"},
            {entry("transformer.wte.weight"), "embedding"},
            {entry("shared.weight"), "embedding"},
            {entry("lm_head.weight"), "output head"},
            {entry("embed_out.weight"), "embedding"},
            {entry("cls.predictions.decoder.weight"), "output head"},
            {entry("output.weight"), "output head"},
            {entry("model.norm.weight", [256]), "norm"},
            {entry("embeddings.LayerNorm.weight", [256]), "norm"},
            {entry("h.0.ln_1.weight", [256]), "norm"},
            {entry("layer.0.dense.bias", [256]), "bias"},
            {entry("layer.0.A_log"), "not a linear weight"},
            {entry("layer.0.conv1d.weight", [256, 1, 4]), "3 dimensions"},
            {entry("layer.0.scale", []), "0 dimensions"},
            {entry("layer.0.mlp.gate.weight"), "router"},
            {entry("a.weight", [64, 63]), "only 4032 elements"},
            {entry("a.weight", [0, 64]), "no elements"},
            {entry("position_ids", [1, 512], "i64"), "i64 values"},
            {entry("a.weight", [64, 64], "f8_e4m3"), "f8_e4m3 values"}
          ] do
        assert Recipe.decide(recipe(), entry) == {:keep, reason}
      end
    end

    test "knows tied heads, transposed weights and projections kept in f32 from the config" do
      weight = entry("h.0.attn.c_attn.weight")
      assert Recipe.decide(recipe(), weight, %{"model_type" => "llama"}) == :quantize

      assert Recipe.decide(recipe(), weight, %{"model_type" => "gpt2"}) ==
               {:keep, "stored transposed by gpt2"}

      wo = entry("encoder.block.0.layer.1.DenseReluDense.wo.weight")
      assert Recipe.decide(recipe(), wo, %{"model_type" => "t5"}) == {:keep, "kept in f32 by t5"}

      assert Recipe.decide(recipe(), entry("lm_head.weight"), %{"tie_word_embeddings" => true}) ==
               {:keep, "output head, tied to the embedding"}
    end

    test "exclude wins over include, include over the rule, nothing over the possible" do
      recipe = recipe(include: ["lm_head", ~r/bias$/], exclude: "layers\\.0\\.")
      assert Recipe.decide(recipe, entry("lm_head.weight")) == :quantize
      assert Recipe.decide(recipe, entry("x.bias", [64])) == {:keep, "bias"}

      assert Recipe.decide(recipe, entry("layers.0.up.weight")) ==
               {:keep, "excluded by /layers\\.0\\./"}

      both = recipe(include: "head", exclude: "head")
      assert {:keep, "excluded" <> _} = Recipe.decide(both, entry("lm_head.weight"))
    end

    test "min_elements can be lowered" do
      assert Recipe.decide(recipe(min_elements: 0), entry("a.weight", [2, 64])) == :quantize
    end
  end

  test "kept_modules/1 lists what transformers would take for quantized" do
    decided = [
      {entry("model.embed_tokens.weight"), {:keep, "embedding"}},
      {entry("model.layers.0.q_proj.weight"), :quantize},
      {entry("model.layers.0.small.weight", [2, 2]), {:keep, "only 4 elements"}},
      {entry("model.layers.0.small.bias", [2]), {:keep, "bias"}},
      {entry("model.norm.weight", [64]), {:keep, "norm"}}
    ]

    assert Recipe.kept_modules(decided) == ["model.layers.0.small", "lm_head"]

    assert Recipe.kept_modules([{entry("lm_head.weight"), {:keep, "output head"}}]) == ["lm_head"]
  end
end

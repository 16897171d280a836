defmodule VivaTensor.Recipe.Presets do
  @moduledoc false
  # Recipes by name, in the order in which they are shown to users.

  @groups_of_128 [format: :int4, block_size: 128, symmetric: false]
  @awq @groups_of_128 ++ [layout: :awq]
  # Methods that look at activations gain more from searched scales than they cost.
  @searched [scales: :mse]

  @presets [
    int8: {"8-bit integers, one scale a row, as LLM.int8() loads them", [format: :int8]},
    fp8: {"8-bit floats (E4M3), one scale a row", [format: :fp8_e4m3]},
    nf4: {"the 4-bit table of QLoRA, scales quantized too", [format: :nf4, double_quant: true]},
    int4: {"4-bit integers in groups of 128 with zero points", @awq},
    awq:
      {"the same, columns scaled and blocks clipped by what they meet",
       @awq ++ [method: :awq] ++ @searched},
    awq_gptq:
      {"the same, columns scaled, then rounded one after the other",
       @awq ++ [method: :awq_gptq] ++ @searched},
    gptq:
      {"4-bit integers in groups of 128, rounded one column after the other",
       @groups_of_128 ++ [layout: :gptq, method: :gptq] ++ @searched},
    smoothquant:
      {"8-bit integers whose activations fit in 8 bits too",
       [format: :int8, method: :smoothquant]},
    nvfp4: {"4-bit floats, an 8-bit scale for 16 of them", [format: :nvfp4]},
    mxfp4: {"4-bit floats, a power of two for 32 of them", [format: :mxfp4]},
    mxfp8: {"8-bit floats, a power of two for 32 of them", [format: :mxfp8]},
    sparse24: {"two of every four weights, as floats", [format: :sparse24]},
    q8_0: {"ggml's 8-bit blocks of 32, in a GGUF file", [format: :q8_0]},
    q6_k: {"ggml's 6-bit blocks of 256, in a GGUF file", [format: :q6_k]},
    q5_k: {"ggml's 5-bit blocks of 256, in a GGUF file", [format: :q5_k]},
    q4_k: {"ggml's 4-bit blocks of 256, in a GGUF file", [format: :q4_k]},
    q3_k: {"ggml's 3-bit blocks of 256, in a GGUF file", [format: :q3_k]},
    q2_k: {"ggml's 2-bit blocks of 256, in a GGUF file", [format: :q2_k]}
  ]

  def all do
    for {name, {about, options}} <- @presets, do: %{name: name, about: about, options: options}
  end

  def fetch(name) do
    with {:ok, {_about, options}} <- Keyword.fetch(@presets, name), do: {:ok, options}
  end

  def names, do: @presets |> Keyword.keys() |> Enum.join(", ")
end

defmodule Mix.Tasks.Viva.Convert do
  @shortdoc "Gives a quantized checkpoint another layout"

  @moduledoc """
  Gives a quantized checkpoint another layout.

      mix viva.convert SOURCE --to DIR --layout gguf

  SOURCE is a `.safetensors` or `.gguf` file, a sharded directory with its index, or a
  Hugging Face model directory, in any layout that is read. DIR is created, complete
  or not at all, with the weights, the config that says how to load them, the
  tokenizer files of SOURCE and a report, `report.json` and in pictures `report.html`.
  In the gguf layout the weights, the config and the tokenizer are one file,
  `model.gguf`; out of it they are restored, the tokenizer where it is byte-level BPE.

  Codes are kept wherever the layout has a format with the same values, and the report
  then says `lossless`: both decode to the same f32, bit for bit, zeros of both signs
  taken for equal. Where it has none, weights are quantized again from their values, to
  as many bits or the next that it holds, and the report has their SQNR against the
  values of SOURCE. Weights for which it has no place become floats. What was not
  quantized stays so: see `VivaTensor.Conversion`.

  ## Flags

    * `--to DIR` - where to write; required
    * `--layout gguf|awq|gptq|gptq-v2|compressed-tensors|bitsandbytes|mlx|plain` - how it
      is spelled; `plain` is floats without a trace of quantization; required
    * `--dtype f32|f16|bf16` - casts floats, those that were not quantized too; by
      default weights become what the model computes in, and the rest stays as it is
    * `--memory-limit 512MB` - bytes in flight
    * `--max-shard-size 5GB` - of the written files
    * `--threads N` - native threads
    * `--nodes a@h,b@h|connected` - Erlang nodes that work along, on the same storage: see
      `VivaTensor.Job.start/1`
    * `--resume` - go on with what an earlier run left of DIR, or begin; refused where
      SOURCE or what is asked for is not what it was
    * `--force` - replace DIR if it exists; without `--resume` also what an earlier run left
    * `--json` - print the report as JSON

  ## Examples

      mix viva.convert ~/models/llama-awq --to llama-gguf --layout gguf
      mix viva.convert model.gguf --to model-mlx --layout mlx
      mix viva.convert ~/models/llama-gptq --to llama-bf16 --layout plain --dtype bf16

  Progress goes to standard error and the report to standard output. SIGTERM and
  SIGQUIT (Ctrl-\\) cancel: what is finished stays beside DIR, in `.DIR.partial`, as it
  does after a crash, for `--resume` to go on with. The exit codes are those of
  `mix viva.quantize`.
  """

  use Mix.Task

  alias VivaTensor.CLI

  @impl Mix.Task
  def run(argv), do: CLI.main("viva.convert", CLI.Convert, argv)
end

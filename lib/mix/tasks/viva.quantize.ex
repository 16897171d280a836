defmodule Mix.Tasks.Viva.Quantize do
  @shortdoc "Compresses a checkpoint with a supervised job"

  @moduledoc """
  Compresses a checkpoint.

      mix viva.quantize SOURCE --to DIR --format nf4

  SOURCE is a `.safetensors` or `.gguf` file, a sharded directory with its index, or a
  Hugging Face model directory. DIR is created, complete or not at all, with the
  weights, the config that says how to load them, the tokenizer files of SOURCE
  and a report, `report.json` and in pictures `report.html`. In the gguf layout the
  weights, the config and the tokenizer are one file, `model.gguf`.

  ## Flags

    * `--to DIR` - where to write; required
    * `--recipe R` - a format, its layout and a method by name, one of those below;
      what other flags say goes before
    * `--format F` - `int8`, `int4`, `nf4`, `fp8_e4m3` …, see `VivaTensor.formats/0`;
      required without `--recipe`
    * `--method rtn|mse|hqq` - round to nearest, search the scales of lowest error,
      or find float zero points by half-quadratic splitting (integers)
    * `--method awq|gptq|awq_gptq|smoothquant` - choose codes by what the layers meet
    * `--statistics FILE` - what they meet, for those methods: a saved
      `VivaTensor.Calibration` with an entry for each layer, as
      `examples/calibration/record.py` records it
    * `--scales rtn|mse` - how these methods choose the scales of blocks
    * `--damping 0.05`, `--order natural|activation`, `--act-order` - of gptq
    * `--sparsity magnitude|wanda|sparsegpt` - gptq gives zeros to two of every four
      columns on the way
    * `--duo-scaling false|true|both` - awq scales columns by what they meet alone, by
      that against what they hold, or tries both
    * `--no-clip` - awq scales columns only
    * `--symmetric`, `--no-symmetric` - integers without or with zero points
    * `--block-size N` - elements that share a scale
    * `--double-quant`, `--no-double-quant` - quantize the scales of nf4 and fp4
    * `--values source|f32|f16|bf16|int8|fp8_e4m3` - what sparse24 keeps its weights as
    * `--layout bitsandbytes|awq|compressed-tensors|gptq|gptq-v2|mlx|gguf` - how it is
      spelled on disk; each format has its usual one
    * `--include RE` - also quantize tensors whose name matches; may be repeated
    * `--exclude RE` - keep tensors whose name matches; may be repeated
    * `--non-finite error|keep` - a weight with NaN or infinities is put aside and the
      job fails in the end, or it is kept as it is
    * `--memory-limit 512MB` - bytes in flight
    * `--max-shard-size 5GB` - of the written files
    * `--threads N` - native threads
    * `--nodes a@h,b@h|connected` - Erlang nodes that work along, on the same storage: see
      `VivaTensor.Job.start/1`
    * `--resume` - go on with what an earlier run left of DIR, or begin; refused where
      SOURCE or what is asked for is not what it was
    * `--force` - replace DIR if it exists; without `--resume` also what an earlier run left
    * `--json` - print the report as JSON

  ## Recipes

  #{Enum.map_join(VivaTensor.Recipe.presets(), "\n", &"  * `#{&1.name}` - #{&1.about}")}

  ## Examples

      mix viva.quantize examples/models/viva-tiny --to viva-tiny-nf4 --format nf4 --double-quant
      mix viva.quantize ~/models/llama --to llama-awq --recipe awq --statistics seen.safetensors
      mix viva.quantize model.safetensors --to out --format int8 --exclude 'layers\\.0\\.'
      mix viva.quantize ~/models/llama --to llama-24 --format sparse24 --values fp8_e4m3
      mix viva.quantize ~/models/llama --to llama-gguf --format q4_k --layout gguf
      mix viva.quantize ~/models/llama --to llama-awq --format int4 --method mse --memory-limit 2GB
      mix viva.quantize /shared/llama --to /shared/llama-nf4 --format nf4 --nodes w@one,w@two

  Progress goes to standard error and the report to standard output. SIGTERM and
  SIGQUIT (Ctrl-\\) cancel: what is finished stays beside DIR, in `.DIR.partial`, as it
  does after a crash, for `--resume` to go on with.

  ## Exit codes

    * 0 - done
    * 1 - a tensor could not be done, for example one with NaN, and was put aside:
      nothing is published, the rest is kept for `--resume`
    * 2 - wrong usage: an unknown flag, format or option
    * 3 - SOURCE or the statistics cannot be read, are not what they claim to be, or
      lack a layer
    * 4 - DIR exists or is left unfinished by an earlier run, cannot be written, or the
      disk is full
    * 130 - cancelled
  """

  use Mix.Task

  alias VivaTensor.CLI

  @impl Mix.Task
  def run(argv), do: CLI.main("viva.quantize", CLI.Quantize, argv)
end

defmodule Mix.Tasks.Viva.Compare do
  @shortdoc "Compares formats and methods on weights"

  @moduledoc """
  Compares formats and methods on one tensor or a whole checkpoint.

      mix viva.compare WEIGHTS [--tensor NAME] [--activations FILE] [--held-out FILE]
          [--formats F,…] [--methods M,…] [--scales rtn|mse] [--svg FILE] [--json]

  WEIGHTS is a `.safetensors` or `.gguf` file, or a directory. Without `--tensor` the
  weights count that `mix viva.quantize` would quantize, all together. Each row of the
  table is a format by a method: bits per weight, SQNR of the weights, seconds of
  quantizing, and with activations the error of the layers' output. A star marks the rows
  of which no other has fewer bits and less error. Nothing is written but the plot.

  ## Flags

    * `--tensor` - one tensor, by its name
    * `--formats` - with commas between them; all, if not given
    * `--methods` - `rtn`, `mse`, `hqq`, and with activations `awq`, `gptq`, `awq_gptq`,
      `smoothquant`, `rotate`; if not given `rtn,mse`, and `awq,gptq,awq_gptq` with
      activations
    * `--scales` - how the methods that look at activations choose the scales of blocks;
      if not given each its own way
    * `--activations` - a saved `VivaTensor.Calibration`, or a safetensors file with
      `NAME.samples` for each layer: what those methods look at. `examples/calibration`
      records one.
    * `--held-out` - another one, which no method sees: the output error is measured on
      its rows. Without it, on those of `--activations`, and the table says so.
    * `--svg` - a plot of the rows, written to this file
    * `--json` - print the rows as JSON, which `mix viva.report` draws

  ## Examples

      mix viva.compare model.safetensors --tensor model.layers.0.mlp.up_proj.weight
      mix viva.compare examples/models/viva-tiny --formats int4,int3,nf4 --svg plot.svg
      mix viva.compare examples/models/viva-tiny --formats int4,int3 --scales mse \\
          --activations examples/calibration/viva-tiny.safetensors \\
          --held-out examples/calibration/viva-tiny-held-out.safetensors

  ## Exit codes

    * 0 - done
    * 1 - weights or activations that cannot be measured: NaN, other columns
    * 2 - wrong usage: an unknown flag, format, method or tensor
    * 3 - a file cannot be read, or is not what it claims to be
    * 4 - the plot cannot be written
  """

  use Mix.Task

  alias VivaTensor.CLI

  @impl Mix.Task
  def run(argv), do: CLI.main("viva.compare", CLI.Compare, argv)
end

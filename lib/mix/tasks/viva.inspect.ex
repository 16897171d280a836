defmodule Mix.Tasks.Viva.Inspect do
  @shortdoc "Lists the tensors of a checkpoint"

  @moduledoc """
  Lists what a checkpoint holds.

      mix viva.inspect PATH [--json]

  PATH is a `.safetensors` or `.gguf` file, a sharded directory with its index, or a Hugging
  Face model directory. The parts of a quantized weight are shown as the one tensor
  that they stand for, with its format, its layout and the bits it takes per weight.

  ## Flags

    * `--json` - print the tensors and totals as JSON

  ## Examples

      mix viva.inspect examples/models/viva-tiny
      mix viva.inspect viva-tiny-nf4 --json

  ## Exit codes

    * 0 - done
    * 2 - wrong usage
    * 3 - PATH cannot be read, or is not what it claims to be
  """

  use Mix.Task

  alias VivaTensor.CLI

  @impl Mix.Task
  def run(argv), do: CLI.main("viva.inspect", CLI.Inspect, argv)
end

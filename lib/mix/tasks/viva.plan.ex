defmodule Mix.Tasks.Viva.Plan do
  @shortdoc "Says what a model takes in each format, and what fits"

  @moduledoc """
  Estimates the memory of a model in each format before anything is quantized.

      mix viva.plan MODEL… [--budget 24GB] [--context 4096] [--batch 1] [--json]

  MODEL is a checkpoint or its directory (headers alone are read), a `config.json` of the
  Llama family, or one of `llama-7b`, `llama-13b`, `llama-30b`, `llama-70b`. Weights are
  counted as a job would write them, scales and kept tensors included; the cache of keys
  and values in 16 bits. Several MODELs share a table of totals.

  ## Flags

    * `--budget 24GB` - what there is; the table says what fits. `--vram` is another name
      for it
    * `--context 4096` - positions in the cache
    * `--batch 1` - sequences in the cache
    * `--json` - print the estimates as JSON

  ## Examples

      mix viva.plan llama-7b --vram 24GB
      mix viva.plan llama-7b llama-13b llama-30b llama-70b --vram 24GB
      mix viva.plan examples/models/viva-tiny --budget 4MB --context 256
      mix viva.plan llama-70b --budget 48GB --context 8192 --batch 4 --json

  ## Exit codes

    * 0 - done
    * 2 - wrong usage, or a configuration of another architecture
    * 3 - MODEL cannot be read, or is not what it claims to be
  """

  use Mix.Task

  alias VivaTensor.CLI

  @impl Mix.Task
  def run(argv), do: CLI.main("viva.plan", CLI.Plan, argv)
end

defmodule Mix.Tasks.Viva.Plan do
  @shortdoc "Says what a model takes in each format, and what fits"

  @moduledoc """
  Estimates the memory of a model in each format before anything is quantized.

      mix viva.plan MODEL… [--budget 24GB] [--context 4096] [--batch 1] [--json]

  MODEL is a checkpoint or its directory (headers alone are read), a `config.json` of the
  Llama family, or one of `llama-7b`, `llama-13b`, `llama-30b`, `llama-70b`. Weights are
  counted as a job would write them, scales and kept tensors included; the cache of keys
  and values in 16 bits. `--vram` is another name for `--budget`. Several MODELs share
  a table of totals.

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
  def run(argv) do
    code =
      case CLI.Plan.parse(argv) do
        {:ok, flags} ->
          Mix.Task.run("app.start")
          CLI.Plan.run(flags)

        :help ->
          Mix.Task.rerun("help", ["viva.plan"])
          0

        {:error, message} ->
          CLI.usage_error("viva.plan", message)
      end

    if code != 0, do: exit({:shutdown, code})
  end
end

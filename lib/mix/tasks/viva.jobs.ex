defmodule Mix.Tasks.Viva.Jobs do
  @shortdoc "Lists, follows, cancels and resumes jobs"

  @moduledoc """
  Lists, follows, cancels and resumes jobs: those that run, in this VM or another, and
  those that were interrupted.

      mix viva.jobs list [DIR]
      mix viva.jobs follow DIR
      mix viva.jobs cancel DIR
      mix viva.jobs resume DIR
      mix viva.jobs report DIR

  A job is known by the directory that it writes. `list` finds the unfinished ones whose
  directories are in DIR, or here. `follow` shows how far one is until it ends, and then
  its report; `cancel` stops it within one unit. `resume` goes on with what was left, with the
  options that it was started with; `report` shows what was done, also of a job that put
  tensors aside.

  ## Flags

    * `--json` - print JSON: what is unfinished, the report, which job was stopped
    * `--memory-limit 512MB`, `--threads N`, `--nodes a@h,b@h` - of resume: other ones
      than before
    * `--non-finite keep` - of resume: keep weights with NaN that were put aside
    * `--statistics FILE` - of resume, where they were in memory

  ## Examples

      mix viva.jobs list ~/models
      mix viva.jobs follow ~/models/llama-nf4
      mix viva.jobs resume ~/models/llama-nf4 --memory-limit 2GB
      mix viva.jobs report ~/models/llama-nf4 --json

  ## Exit codes

  Those of `mix viva.quantize`.
  """

  use Mix.Task

  alias VivaTensor.CLI

  @impl Mix.Task
  def run(argv), do: CLI.main("viva.jobs", CLI.Jobs, argv)
end

defmodule Mix.Tasks.Viva.Vectors do
  @shortdoc "Compresses embedding vectors to codes"

  @moduledoc """
  Compresses embedding vectors to codes to search in.

      mix viva.vectors SOURCE --to DIR --codes int8

  SOURCE is a matrix of floats with a row for each vector: a `.npy` file, or a
  `.safetensors` or `.gguf` file or a directory of them. DIR is created, complete or not
  at all, with safetensors files, a tensor each, and a `report.json`. What is in them, and
  how it gets into a database, is in `docs/vectors.md`; `VivaTensor.Vectors` searches in
  them. To compress a stream, start a job from Elixir: `VivaTensor.Job.start/1`.

  ## Flags

    * `--to DIR` - where to write; required
    * `--codes int8|int4|binary` - what a search looks at first; required
    * `--rescore f16|int8|none` - what the best are scored by again: by default `f16`
      beside int8 codes and `int8` beside others
    * `--metric cosine|dot` - what near means (`cosine`)
    * `--no-center` - take no mean from the vectors
    * `--queries 200` - vectors of the set that look for their ten nearest, to measure
      what searches find; 0 measures nothing
    * `--oversample 10` - how many times ten are scored again then
    * `--tensor NAME` - the matrix, where SOURCE holds several
    * `--memory-limit 512MB` - bytes in flight
    * `--threads N` - native threads
    * `--resume` - go on with what an earlier run left of DIR, or begin; refused where
      SOURCE or what is asked for is not what it was
    * `--force` - replace DIR if it exists; without `--resume` also what an earlier run left
    * `--json` - print the report as JSON

  ## Examples

      mix viva.vectors embeddings.npy --to embeddings-int8 --codes int8
      mix viva.vectors embeddings.safetensors --to out --codes binary --rescore int8
      mix viva.vectors examples/models/viva-tiny --to words --codes int4 \\
          --tensor model.embed_tokens.weight

  Progress goes to standard error and the report to standard output. SIGTERM and
  SIGQUIT (Ctrl-\\) cancel: what is finished stays beside DIR, in `.DIR.partial`, as it
  does after a crash, for `--resume` to go on with.

  ## Exit codes

    * 0 - done
    * 2 - wrong usage: an unknown flag or option
    * 3 - SOURCE cannot be read, is no such matrix, or holds NaN
    * 4 - DIR exists or is left unfinished by an earlier run, cannot be written, or the
      disk is full
    * 130 - cancelled
  """

  use Mix.Task

  alias VivaTensor.CLI

  @impl Mix.Task
  def run(argv), do: CLI.main("viva.vectors", CLI.Vectors, argv)
end

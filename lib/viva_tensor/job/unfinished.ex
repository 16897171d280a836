defmodule VivaTensor.Job.Unfinished do
  @moduledoc false
  # Outputs that jobs are writing now, or left unfinished, as the disk tells of them: in this
  # VM or any other.

  alias VivaTensor.{Error, Native}
  alias VivaTensor.Job.Manifest

  @enforce_keys [:to, :directory, :running, :options]
  defstruct [
    :to,
    :directory,
    :running,
    :options,
    tensors: 0,
    bytes: 0,
    tensors_done: 0,
    bytes_done: 0,
    bytes_written: 0
  ]

  @typedoc """
  `options` are those of the job; what is `done` is recorded in the manifest, of `tensors`
  and their `bytes` in all.
  """
  @type t :: %__MODULE__{
          to: Path.t(),
          directory: Path.t(),
          running: boolean,
          options: keyword,
          tensors: non_neg_integer,
          bytes: non_neg_integer,
          tensors_done: non_neg_integer,
          bytes_done: non_neg_integer,
          bytes_written: non_neg_integer
        }

  @doc "The unfinished outputs whose targets are in a directory."
  @spec list(Path.t()) :: [t]
  def list(directory) do
    for path <- directory |> Path.join(".*.partial/.manifest") |> Path.wildcard(match_dot: true),
        {:ok, unfinished} <- [read(path)],
        do: unfinished
  end

  @doc "The unfinished output of a target."
  @spec of(Path.t()) :: {:ok, t} | {:error, Error.t()}
  def of(to) do
    case Native.output_manifest(to) do
      nil -> nothing(to)
      path -> with :nothing <- read(path), do: nothing(to)
    end
  end

  @doc "The error of a target of which nothing is unfinished."
  @spec nothing(Path.t()) :: {:error, Error.t()}
  def nothing(to) do
    complete? = File.exists?(Path.join(to, "report.json"))
    hint = if complete?, do: "it is complete", else: "start one"

    {:error,
     Error.new(
       :output,
       {:nothing_to_resume, %{path: to}},
       "no job left anything of #{to} to go on with; #{hint}"
     )}
  end

  @doc "The file that asks the job that writes in this directory to stop."
  @spec cancel_request(Path.t()) :: Path.t()
  def cancel_request(directory), do: String.replace_suffix(directory, ".partial", "") <> ".cancel"

  defp read(path) do
    directory = Path.dirname(path)

    with {:ok, records, _at} <- Manifest.read(path) do
      case records do
        [{:begin, begun} | records] ->
          # A shard that is written again has some tensors twice: the last counts.
          rows = for {:unit, _, name, %{row: row}} <- records, into: %{}, do: {name, row}

          # Of a tensor that is not done, ranges may be.
          ranges =
            for {:rows, _, name, range, %{stats: stats}} <- records,
                not is_map_key(rows, name),
                into: %{},
                do: {{name, range}, stats}

          counted = Map.values(rows) ++ Map.values(ranges)

          {:ok,
           %__MODULE__{
             to: begun.options[:to],
             directory: directory,
             running: Native.output_locked(directory),
             options: begun.options,
             tensors: begun.tensors,
             bytes: begun.bytes,
             tensors_done: map_size(rows),
             bytes_done: counted |> Enum.map(& &1.input_bytes) |> Enum.sum(),
             bytes_written: counted |> Enum.map(& &1.output_bytes) |> Enum.sum()
           }}

        [] ->
          :nothing
      end
    end
  end

  @doc "What an unfinished output is made with, in a word: a format, a layout or codes."
  @spec what(t) :: atom
  def what(%__MODULE__{options: options}),
    do: options[:format] || options[:convert] || options[:codes]

  @doc "Options to start its job again with, and those that go before."
  @spec options(t, keyword) :: keyword
  def options(%__MODULE__{options: options}, opts) do
    # Without a name of its own, this node has no others to ask.
    options = if Node.alive?(), do: options, else: Keyword.delete(options, :nodes)
    options |> Keyword.merge(opts) |> Keyword.merge(resume: true)
  end
end

defmodule VivaTensor.Test.Examples do
  @moduledoc """
  The examples of a page, run as who reads it would: its blocks of Elixir follow one
  another, and so do the commands between them.
  """

  import ExUnit.Assertions

  alias VivaTensor.Test.{Directory, Task}

  @doc "The fenced blocks of a page: language, text, and the line before the text."
  def blocks(page) do
    text = File.read!(page)

    for [{at, _}, {from, bytes}, {start, length}] <-
          Regex.scan(~r/^```(\w*)\n(.*?)^```$/ms, text, return: :index) do
      line = text |> binary_part(0, at) |> String.split("\n") |> length()
      {binary_part(text, from, bytes), binary_part(text, start, length), line}
    end
  end

  @doc "The same of one language."
  def blocks(page, language), do: Enum.filter(blocks(page), &match?({^language, _, _}, &1))

  @doc """
  Runs blocks in a directory of their own that holds the examples of the repository:
  Elixir, the `mix viva.*` of `sh`, and `text` that the command before it has to have
  printed. What Elixir prints is returned.
  """
  def run(page, blocks) do
    root = File.cwd!()
    dir = Directory.create!()
    File.ln_s!(Path.join(root, "examples"), Path.join(dir, "examples"))
    env = Code.env_for_eval(file: Path.expand(page))

    ExUnit.CaptureIO.capture_io(fn ->
      File.cd!(dir, fn -> Enum.reduce(blocks, {[], env, ""}, &block/2) end)
    end)
  end

  defp block({"elixir", code, line}, {binding, env, printed}) do
    quoted = Code.string_to_quoted!(code, file: env.file, line: line + 1)
    {_result, binding, env} = Code.eval_quoted_with_env(quoted, binding, env)
    {binding, env, printed}
  end

  defp block({"sh", commands, line}, {binding, env, _printed}) do
    commands = commands |> String.replace(~r/\\\n\s*/, "") |> String.split("\n", trim: true)
    {binding, env, Enum.map_join(commands, &command(&1, "#{env.file}:#{line}"))}
  end

  defp block({"text", shown, line}, {_, env, printed} = state) do
    assert printed =~ shown, "#{env.file}:#{line}: the command printed\n#{printed}"
    state
  end

  defp block(_other, state), do: state

  defp command(line, where) do
    {argv, target} =
      case line |> OptionParser.split() |> Enum.split_while(&(&1 != ">")) do
        {argv, []} -> {argv, nil}
        {argv, [">", target]} -> {argv, target}
      end

    assert ["mix", "viva." <> name | argv] = argv, where
    task = Module.concat(Mix.Tasks.Viva, String.capitalize(name))
    assert {0, stdout, stderr} = Task.run(task, argv), where
    assert is_binary(stderr)
    if target, do: File.write!(target, stdout)
    stdout
  end
end

defmodule VivaTensor.ErlangTest do
  # Runs a program of its own.
  use ExUnit.Case, async: true

  alias VivaTensor.Test.Directory

  @page "docs/erlang.md"
  @timeout 600_000

  defp block(language) do
    [_, code] = Regex.run(~r/^```#{language}\n(.*?)^```$/ms, File.read!(@page))
    code
  end

  @tag timeout: @timeout
  test "what the guide shows runs in plain Erlang, as it is written" do
    dir = Directory.create!()
    File.ln_s!(Path.expand("examples"), Path.join(dir, "examples"))
    File.ln_s!(Path.expand(Mix.Project.build_path()), Path.join(dir, "dev"))
    File.write!(Path.join(dir, "shown.erl"), block("erlang"))

    # It is compiled already, and where the tests run.
    assert ["mix compile", path, start] = "sh" |> block() |> String.split("\n", trim: true)
    path = String.replace(path, "_build/dev", Path.join(dir, "dev"))

    evaluate =
      ~s/case file:eval("shown.erl") of ok -> halt(0); {error, Why} -> / <>
        ~s/io:format("~ts~n", [file:format_error(Why)]), halt(1) end/

    command = "#{path}\n#{start} -noshell -eval '#{evaluate}'"

    assert {"", 0} = System.cmd("sh", ["-ec", command], cd: dir, stderr_to_stdout: true)
    assert File.regular?(Path.join(dir, "viva-tiny-nf4/model.safetensors"))
  end
end

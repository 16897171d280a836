defmodule VivaTensor.NotebooksTest do
  # Cells print, and the directory for temporary files is one for all processes.
  use ExUnit.Case, async: false

  alias VivaTensor.Test.{Directory, Examples}

  @notebooks Path.wildcard("notebooks/*.livemd")

  setup do
    before = System.get_env("TMPDIR")

    on_exit(fn ->
      if before, do: System.put_env("TMPDIR", before), else: System.delete_env("TMPDIR")
    end)

    dir = Directory.create!()
    System.put_env("TMPDIR", dir)
    {:ok, dir: dir}
  end

  test "there are three" do
    assert length(@notebooks) == 3
  end

  for notebook <- @notebooks do
    # Jobs sync what they write, and a notebook has several.
    @tag timeout: 600_000
    test "the cells of #{notebook} run in their order, and leave nothing", %{dir: dir} do
      [{"elixir", install, _line} | cells] = Examples.blocks(unquote(notebook), "elixir")

      # It would compile the library again; the one that is tested is on the code path.
      assert install == "Mix.install([{:viva_tensor, path: Path.expand(\"..\", __DIR__)}])\n"
      assert [_, _ | _] = cells
      Examples.run(unquote(notebook), cells)
      assert Path.wildcard(Path.join(dir, "viva-tensor-notebook*")) == []
    end

    test "#{notebook} is as Livebook writes it: a title, sections, cells without results" do
      text = File.read!(unquote(notebook))
      assert [_title] = Regex.scan(~r/^# .+$/m, Regex.replace(~r/^```.*?^```$/ms, text, ""))
      assert text =~ ~r/^## /m
      refute text =~ "livebook:{\"output\""
      for {language, _, _} <- Examples.blocks(unquote(notebook)), do: assert(language == "elixir")
    end

    test "the cells of #{notebook} are formatted" do
      for {_, cell, line} <- Examples.blocks(unquote(notebook), "elixir") do
        formatted = cell |> Code.format_string!() |> IO.iodata_to_binary()
        assert cell == formatted <> "\n", "#{unquote(notebook)}:#{line}"
      end
    end
  end
end

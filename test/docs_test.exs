defmodule VivaTensor.DocsTest do
  # The examples write into the working directory, which is one for all processes.
  use ExUnit.Case, async: false

  alias VivaTensor.{Checkpoint, Job, Quantized, Recipe, Tensor}
  alias VivaTensor.Test.{Directory, Examples, Libraries}

  Code.require_file("bench/formats_table.exs")

  @model "examples/models/viva-tiny"
  @weight "model.layers.0.mlp.up_proj.weight"
  @pages ["README.md" | Path.wildcard("docs/**/*.{md,cheatmd}")]

  for page <- @pages,
      # What is typed in guides is run too. Of other pages the tests of their languages run it.
      blocks =
        if(String.starts_with?(page, "docs/guides/"),
          do: Examples.blocks(page),
          else: Examples.blocks(page, "elixir")
        ),
      blocks != [] do
    {needing, others} =
      Enum.split_with(blocks, fn {_, code, _} -> code =~ ~r/\b(Nx|Axon|Bumblebee)\b/ end)

    absent = needing != [] && Libraries.absent([Nx, Axon], "What #{page} shows of Nx")
    if absent && others == [], do: @tag(skip: absent)
    @blocks if absent, do: others, else: blocks

    # Jobs sync what they write, and a page may have several.
    @tag timeout: 600_000
    test "the examples of #{page} run" do
      Examples.run(unquote(page), @blocks)
    end
  end

  # Who reads may type a block line by line, and iex takes an expression for complete where
  # it can be: a pipeline that the next line goes on with is not the one of the page.
  test "iex takes the Elixir of all pages line by line" do
    for page <- @pages, {_, code, at} <- Examples.blocks(page, "elixir") do
      left =
        for line <- String.split(code, ~r/(?<=\n)/), reduce: "" do
          begun ->
            refute begun == "" and line =~ ~r/^\s*\|>/, "#{page}:#{at}: #{line}"

            case Code.string_to_quoted(begun <> line) do
              {:ok, _expression} -> ""
              {:error, {_, _, ""}} -> begun <> line
            end
        end

      assert left == "", "#{page}:#{at} does not end"
    end
  end

  test "no page writes where another one did, for who reads both in one directory" do
    written =
      for page <- @pages, not String.contains?(page, "zh-CN") do
        for line <- page |> File.read!() |> String.split("\n"),
            # Commands about a MODEL of the reader's are not typed as they are.
            not (line =~ ~r/[A-Z]{4}/),
            [_, target] <- Regex.scan(~r/(?:--to |\bto: "|\{to, <<")([\w.-]+)/, line),
            uniq: true,
            do: target
      end

    assert [_, _ | _] = written = List.flatten(written)
    assert written -- Enum.uniq(written) == []
  end

  # Indented commands of the README that print what follows them.
  for command <- ["mix viva.plan llama-7b llama-13b llama-30b llama-70b --vram 24GB"] do
    test "the README shows what #{command} prints" do
      ["mix", _task | argv] = String.split(unquote(command))
      assert {0, printed, ""} = VivaTensor.Test.Task.run(Mix.Tasks.Viva.Plan, argv)
      shown = Regex.replace(~r/^(?=.)/m, unquote(command) <> "\n\n" <> printed, "    ")
      assert File.read!("README.md") =~ shown
    end
  end

  for page <- ["docs/cheatsheet.cheatmd" | Path.wildcard("docs/guides/*.md")] do
    test "#{page} shows commands that the tasks take, also where they are not run" do
      text = unquote(page) |> File.read!() |> String.replace(~r/\\\n\s*/, "")

      for [command] <- Regex.scan(~r/(?<=^    |`)mix viva\.\w+ [^`\n]+/m, text) do
        ["mix", "viva." <> name | argv] =
          command |> String.split(" # ") |> hd() |> OptionParser.split()

        task = Module.concat(VivaTensor.CLI, String.capitalize(name))
        assert {:ok, _} = task.parse(argv), command
      end
    end
  end

  test "every page about formats has an example" do
    for page <- Path.wildcard("docs/formats/*.md") do
      assert [_ | _] = Examples.blocks(page, "elixir"), page
    end
  end

  test "the figures of formats in guides are those of docs/formats.md" do
    figures = fn page, row ->
      for [_ | cells] <- Regex.scan(row, File.read!(page)), do: cells
    end

    measured = figures.("docs/formats.md", ~r/^\| (\w+) +\| rtn .*\| +([\d.]+) \| +([\d.]+) \|$/m)
    row = ~r/^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \|/m
    assert [_ | _] = quoted = figures.("docs/guides/choosing-a-format.md", row)
    assert quoted -- measured == []
  end

  @tag timeout: 600_000
  test "the tables of docs/formats.md are up to date (make formats)" do
    committed = File.read!("docs/formats.md")
    made = FormatsTable.page()
    assert without_decibels(committed) == without_decibels(made)

    for {ours, theirs} <- Enum.zip(decibels(committed), decibels(made)) do
      assert_in_delta ours, theirs, 0.02
    end
  end

  # Cells of the columns of decibels have two digits, those of bits four.
  @decibels ~r/(?<=\| ) *-?\d+\.\d\d(?= \|)/

  defp without_decibels(page), do: Regex.replace(@decibels, page, "dB")

  defp decibels(page) do
    for [cell] <- Regex.scan(@decibels, page), do: cell |> String.trim() |> String.to_float()
  end

  for {format, layouts} <- FormatsTable.layouts(), layout <- layouts do
    test "#{format} is written and read in the layout #{layout}" do
      {:ok, recipe} = Recipe.new(format: unquote(format), layout: unquote(layout))
      to = Path.join(Directory.create!(), "out")

      # One weight, so that many pairs take little time.
      {:ok, job} =
        Job.start(
          source: @model,
          to: to,
          format: unquote(format),
          layout: unquote(layout),
          exclude: "^(?!#{Regex.escape(@weight)}$)"
        )

      {:ok, report} = Job.await(job)
      assert report.quantized == 1

      path = if unquote(layout) == :gguf, do: Path.join(to, "model.gguf"), else: to
      %Quantized{} = read = path |> Checkpoint.open!() |> Checkpoint.get!(@weight)
      weight = @model |> Checkpoint.open!() |> Checkpoint.get!(@weight)
      made = VivaTensor.quantize!(weight, unquote(format), Map.to_list(recipe.settings))
      assert read.format == unquote(format)
      assert values(read) == values(made)
    end
  end

  defp values(q), do: q |> VivaTensor.dequantize!(dtype: :f32) |> Tensor.to_binary!()
end

defmodule VivaTensor.CommandLineTest do
  # The tasks write to standard output and standard error.
  use ExUnit.Case, async: false
  doctest VivaTensor.CLI.Style

  alias VivaTensor.{CLI, Native, Test}
  alias VivaTensor.Test.Directory

  @tasks (for file <- Path.wildcard("lib/mix/tasks/viva.*.ex") do
            "viva." <> name = file |> Path.basename() |> Path.rootname()
            {name, String.capitalize(name)}
          end)

  @model "examples/models/viva-tiny"

  defp task(name), do: Module.concat(Mix.Tasks.Viva, name)
  defp work(name), do: Module.concat(CLI, name)

  defp page(name) do
    {:docs_v1, _, _, _, %{"en" => page}, _, _} = Code.fetch_docs(task(name))
    page
  end

  # Commands in a page, with continued lines joined.
  defp commands(page) do
    page = String.replace(page, ~r/\\\n\s*/, "")
    for [_, command] <- Regex.scan(~r/^    (mix viva\..*)$/m, page), do: command
  end

  defp section(page, title) do
    assert [_, section] = Regex.run(~r/^## #{title}\n(.*?)(?=^## |\z)/ms, page)
    section
  end

  test "there are tasks" do
    assert length(@tasks) >= 9
  end

  for {name, module} <- @tasks do
    describe "mix viva.#{name}" do
      @name "viva.#{name}"
      @module module

      test "has a line in mix help, and a page with flags, examples and exit codes" do
        assert Mix.Task.shortdoc(task(@module))
        page = page(@module)
        for title <- ["Flags", "Examples"], do: section(page, title)
        assert page =~ ~r/exit codes/i

        for flag <- ["--help", "-h"] do
          assert {0, stdout, ""} = Test.Task.run(task(@module), [flag])
          assert stdout =~ "mix #{@name}" and stdout =~ "Examples"
          refute stdout =~ "\e["
        end
      end

      test "has examples that it takes" do
        assert [_, _ | _] = commands = @module |> page() |> section("Examples") |> commands()
        assert Enum.any?(commands, &String.starts_with?(&1, "mix #{@name} "))

        for command <- commands do
          command = command |> String.split(" > ") |> hd()
          ["mix", "viva." <> name | argv] = OptionParser.split(command)
          assert {:ok, _} = work(String.capitalize(name)).parse(argv), command
        end
      end

      test "says what every flag is for" do
        flags = @module |> page() |> section("Flags")

        for {key, _type} <- work(@module).switches() do
          assert flags =~ ~r/#{CLI.flag(key)}\b/ or flags =~ ~r/--no-#{key}\b/, CLI.flag(key)
        end

        known = for {key, _type} <- [{:help, :boolean} | all_switches()], do: CLI.flag(key)

        for [flag] <- Regex.scan(~r/--[a-z][a-z-]*/, page(@module)) do
          assert String.replace_prefix(flag, "--no-", "--") in known, flag
        end
      end

      test "knows what a misspelled flag was meant to be" do
        for {key, _type} <- work(@module).switches() do
          flag = CLI.flag(key)
          {start, last} = String.split_at(flag, -1)
          assert {2, "", stderr} = Test.Task.run(task(@module), [start <> "x" <> last])
          assert stderr =~ "#{@name}: unknown flag"
          assert stderr =~ ~r/did you mean --/
          assert stderr =~ "mix help #{@name}"
        end
      end

      test "may be read by a machine" do
        assert work(@module).switches()[:json] == :boolean
      end
    end
  end

  defp all_switches, do: Enum.flat_map(@tasks, fn {_, name} -> work(name).switches() end)

  test "a flag is the same in every task" do
    for {key, types} <- Enum.group_by(all_switches(), &elem(&1, 0), &elem(&1, 1)) do
      assert [_] = Enum.uniq(types), CLI.flag(key)
    end
  end

  test "names that are misspelled are suggested" do
    to = Path.join(Directory.create!(), "out")

    for {name, argv, message} <- [
          {"Quantize", [@model, "--to", to, "--format", "nf5"], "did you mean nf4?"},
          {"Quantize", [@model, "--to", to, "--recipe", "gtpq"], "did you mean gptq?"},
          {"Quantize", [@model, "--to", to, "--format", "nf4", "--method", "gptqq"],
           "--method is rtn, mse, hqq, awq, gptq, awq_gptq, smoothquant or rotate, not gptqq; " <>
             "did you mean gptq?"},
          {"Quantize", [@model, "--to", to, "--format", "nf4", "--non-finite", "kep"],
           "--non-finite is error or keep, not kep; did you mean keep?"},
          {"Convert", [@model, "--to", to, "--layout", "guff"], "did you mean gguf?"},
          {"Convert", [@model, "--to", to, "--layout", "mlx", "--dtype", "bf61"],
           "did you mean bf16?"},
          {"Compare", [@model, "--formats", "int8,nf5"], "did you mean nf4?"},
          {"Compare", [@model, "--methods", "rtn,mze"], "did you mean mse?"},
          {"Vectors", ["a.npy", "--to", to, "--codes", "bianry"], "did you mean binary?"},
          {"Bench", ["qualty"], "did you mean quality?"},
          {"Jobs", ["lst"], "did you mean list?"}
        ] do
      assert {2, "", stderr} = Test.Task.run(task(name), argv)
      assert stderr =~ message
    end

    assert {3, "", stderr} = Test.Task.run(task("Plan"), ["lama-7b"])
    assert stderr =~ "did you mean llama-7b?"
    assert {3, _, stderr} = Test.Task.run(task("Plan"), ["no/such/model"])
    refute stderr =~ "did you mean"
  end

  test "what is JSON is alone on standard output" do
    dir = Directory.create!()
    to = Path.join(dir, "nf4")
    argv = [@model, "--to", to, "--format", "nf4", "--exclude", "layers\\.0\\."]

    for {name, argv} <- [
          {"Quantize", argv},
          {"Convert", [to, "--to", Path.join(dir, "plain"), "--layout", "plain"]},
          {"Inspect", [to]},
          {"Compare",
           [@model, "--tensor", "model.layers.0.mlp.up_proj.weight"] ++ ["--formats", "nf4"]},
          {"Plan", ["llama-7b"]},
          {"Jobs", ["list", dir]},
          {"Jobs", ["report", to]},
          {"Report", [to, "--to", Path.join(dir, "page.html")]},
          {"Inspect", ["no/such/file"]},
          {"Report", ["no/such/file"]}
        ] do
      assert {_code, stdout, _} = Test.Task.run(task(name), argv ++ ["--json"])
      assert {:ok, _} = Native.json_decode(stdout), name
    end
  end

  describe "colours" do
    script = System.find_executable("script")
    terminal? = script && match?({_, 0}, System.cmd(script, ["-qec", "true", "/dev/null"]))

    unless terminal? do
      reason = "no pseudo-terminal can be had here: colours are not looked at"
      IO.puts(:stderr, "\n#{inspect(__MODULE__)} DOES NOT RUN IN FULL: #{reason}\n")
      @describetag skip: reason
    end

    # A terminal of its own for the command.
    defp on_terminal(arguments, env) do
      command =
        Enum.join(["mix", "run", "--no-compile", "--no-deps-check", "-e" | arguments], " ")

      script = ["-qec", command, "/dev/null"]
      env = [{"TERM", "xterm"}, {"NO_COLOR", nil}, {"MIX_ENV", "test"} | env]
      {output, 0} = System.cmd(System.find_executable("script"), script, env: env)
      output
    end

    @plan ~s('VivaTensor.CLI.Plan.run(models: ["llama-7b"], budget: "12GB"\)')

    test "are there on a terminal, and neither with NO_COLOR nor in a pipe" do
      shown = on_terminal([@plan], [])
      assert shown =~ "\e[32mfits, "
      assert shown =~ "\e[31m"
      assert shown =~ ~r/\e\[1mformat +layout/

      refute on_terminal([@plan], [{"NO_COLOR", "1"}]) =~ "\e["
      refute on_terminal([@plan, "|", "cat"], []) =~ "\e["
      assert on_terminal([@plan], [{"NO_COLOR", ""}]) =~ "\e[32m"
    end

    test "of errors follow standard error" do
      failing = ~s('VivaTensor.CLI.Inspect.run(path: "no/such/file"\)')
      assert on_terminal([failing], []) =~ "\e[31mviva.inspect:\e[0m no/such/file"
      refute on_terminal([failing], [{"NO_COLOR", "1"}]) =~ "\e["
      refute on_terminal([failing, "2>&1", "|", "cat"], []) =~ "\e["
    end
  end
end

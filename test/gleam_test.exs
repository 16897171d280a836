defmodule VivaTensor.GleamTest do
  # Compiles and runs the package in programs of its own.
  use ExUnit.Case, async: true

  alias VivaTensor.Test.Directory

  @package "gleam"
  @example "examples/gleam"
  @sources Path.wildcard("gleam/src/**/*.gleam")
  @ffi "gleam/src/viva_tensor_gleam_ffi.erl"

  defp source(module), do: File.read!("gleam/src/viva_tensor/#{module}.gleam")

  # A type's constructors, each with its fields, as the compiler spells them in Erlang.
  defp constructors(module, type) do
    [_, body] = Regex.run(~r/^pub type #{type} \{\n(.*?)^\}/ms, source(module))
    body = Regex.replace(~r{^\s*///?.*\n}m, body, "")

    for [_, name | fields] <- Regex.scan(~r/^  ([A-Z]\w*)(?:\((.*?)\))?$/ms, body) do
      labels = for [_, label] <- Regex.scan(~r/(\w+):/, Enum.join(fields)), do: label
      {snake_case(name), labels}
    end
  end

  defp names(module, type), do: for({name, _} <- constructors(module, type), do: name)

  defp snake_case(name) do
    Regex.replace(~r/(?<=.)[A-Z]/, name, "_\\0") |> String.downcase()
  end

  # Gleam has no underscore in a constructor: q8_0 is Q80.
  defp spelled(name) do
    name |> to_string() |> String.replace("-", "_") |> String.replace(~r/^(q\d)_(\d)$/, "\\1\\2")
  end

  test "it has the formats that there are" do
    assert names("format", "Format") == for(f <- VivaTensor.formats(), do: spelled(f.name))
  end

  test "it has the layouts that there are, and plain" do
    assert names("layout", "Layout") ==
             for(l <- VivaTensor.layouts(), do: spelled(l.name)) ++ ["plain"]
  end

  test "it has the dtypes that there are" do
    {:error, error} = VivaTensor.Tensor.from_list([], :none, [0])
    {:unknown_dtype, %{known: known}} = error.reason
    assert Enum.sort(names("tensor", "Dtype")) == known |> String.split(", ") |> Enum.sort()
  end

  test "it has a constructor for each kind of error, with details that there are" do
    {:docs_v1, _, _, _, %{"en" => doc}, _, _} = Code.fetch_docs(VivaTensor.Error)

    kinds =
      for [_, kinds, details] <- Regex.scan(~r/^\| (`:.*?) \| (.*?) ?\|$/m, doc),
          [_, kind] <- Regex.scan(~r/`:(\w+)`/, kinds),
          into: %{},
          do: {kind, details}

    ours = Map.new(constructors("error", "Error"))
    assert {["op", "message", "kind"], ours} = Map.pop!(ours, "other")
    assert ours |> Map.keys() |> Enum.sort() == kinds |> Map.keys() |> Enum.sort()

    for {kind, ["op", "message" | fields]} <- ours, field <- fields do
      assert kinds[kind] =~ "`#{field}`", "#{kind} has no #{field}"
    end
  end

  test "every kind of error of the core is among those that are documented" do
    core = File.read!("native/viva_core/src/error.rs")
    [_, body] = Regex.run(~r/^pub enum Error \{\n(.*?)^\}/ms, core)
    kinds = for [_, name] <- Regex.scan(~r/^    ([A-Z]\w*)/m, body), do: snake_case(name)
    assert kinds -- names("error", "Error") == []
  end

  test "what it calls is there, and the compiler of Erlang has nothing to say" do
    assert {:ok, _module, binary, []} =
             @ffi |> String.to_charlist() |> :compile.file([:binary, :return])

    {:ok, {_, [exports: exports]}} = :beam_lib.chunks(binary, [:exports])

    called =
      for file <- @sources,
          [_, name, parameters] <-
            Regex.scan(
              ~r/@external\(erlang, "viva_tensor_gleam_ffi", "(\w+)"\)\npub fn \w+\((.*?)\) ->/s,
              File.read!(file)
            ) do
        {String.to_atom(name), parameters |> String.split(",") |> Enum.count(&(&1 =~ ":"))}
      end

    own = exports -- [module_info: 0, module_info: 1]
    assert called |> Enum.uniq() |> Enum.sort() == Enum.sort(own)
  end

  test "everything public is documented" do
    for file <- @sources do
      text = File.read!(file)
      assert String.starts_with?(text, "//// "), file

      undocumented =
        ~r/^(?!\/\/\/|@external|\/\/\/\/).*\n(?:@external.*\n)?pub (?:fn|type) (\w+)/m

      assert Regex.scan(undocumented, text) == [], file
    end
  end

  test "it has the version of the project" do
    assert File.read!("gleam/gleam.toml") =~
             ~s(\nversion = "#{Mix.Project.config()[:version]}"\n)
  end

  test "the guide shows the example as it is" do
    example = File.read!("#{@example}/src/compress.gleam")
    blocks = Regex.scan(~r/^```gleam\n(.*?)^```$/ms, File.read!("docs/gleam.md"))
    assert [_ | _] = blocks
    for [_, block] <- blocks, do: assert(example =~ block)
  end

  describe "compiled" do
    # The Erlang that the compiler writes has sigils.
    otp = 27
    gleam = System.get_env("VIVA_TENSOR_GLEAM") || System.find_executable("gleam")

    reason =
      cond do
        gleam == nil ->
          "no Gleam compiler here (VIVA_TENSOR_GLEAM, or gleam on PATH)"

        String.to_integer(System.otp_release()) < otp ->
          "the Gleam compiler needs Erlang/OTP #{otp}, and this is #{System.otp_release()}"

        true ->
          nil
      end

    if reason do
      IO.puts(:stderr, "\n#{inspect(__MODULE__)} DOES NOT COMPILE THE PACKAGE: #{reason}\n")
      @describetag skip: reason
    end

    @gleam gleam && Path.expand(gleam)
    @describetag timeout: 600_000

    setup do
      # A build directory of its own, and the path between the two as it is.
      dir = Directory.create!()

      for package <- [@package, @example] do
        to = Path.join(dir, package)
        to |> Path.dirname() |> File.mkdir_p!()
        File.cp_r!(package, to)
        File.rm_rf!(Path.join(to, "build"))
      end

      {:ok, dir: dir}
    end

    defp gleam(dir, arguments) do
      System.cmd(@gleam || "gleam", arguments, cd: dir, stderr_to_stdout: true)
    end

    # Plain Erlang, with what a user has on the path.
    defp erl(dir, package, main, arguments, env) do
      libraries = [
        Path.dirname(:code.lib_dir(:elixir)),
        Path.join(Mix.Project.build_path(), "lib")
      ]

      paths = for ebin <- Path.wildcard("#{dir}/build/dev/erlang/*/ebin"), do: ["-pa", ebin]
      start = "{ok, _} = application:ensure_all_started(#{package}), #{main}:main(), halt()."

      :code.root_dir()
      |> Path.join("bin/erl")
      |> System.cmd(
        List.flatten(paths) ++
          ["-noshell", "-logger", "level", "info", "-eval", start, "-extra" | arguments],
        cd: dir,
        env: [{"ERL_LIBS", Enum.join(libraries, ":")} | env],
        stderr_to_stdout: true
      )
    end

    test "it is formatted, has no warnings, and its tests pass on plain Erlang", %{dir: dir} do
      package = Path.join(dir, @package)
      [_, example] = Regex.run(~r/^```gleam\n(.*?)^```$/ms, File.read!("#{package}/README.md"))
      File.write!("#{package}/test/readme_example.gleam", example)
      assert {"", 0} = gleam(package, ~w(format --check src test))
      assert {_, 0} = gleam(package, ~w(build --warnings-as-errors))

      env = [
        {"VIVA_TENSOR_TEST_DIRECTORY", Path.join(dir, "tests")},
        {"VIVA_TENSOR_TEST_MODEL", Path.expand("examples/models/viva-tiny")}
      ]

      {output, code} = erl(package, "viva_tensor_gleam", "viva_tensor_gleam_test", [], env)
      assert code == 0, output
      assert output =~ ~r/^[1-9]\d* tests, 0 failed$/m
    end

    test "the example runs, and prints what the guide says", %{dir: dir} do
      project = Path.join(dir, @example)
      assert {"", 0} = gleam(project, ~w(format --check src))
      assert {_, 0} = gleam(project, ~w(build --warnings-as-errors))
      model = Path.expand("examples/models/viva-tiny")

      {output, code} = erl(project, "compress", "compress", [model, "viva-tiny-nf4"], [])
      assert code == 0, output
      assert [_, shown] = Regex.run(~r/^```text\n(.*?)^```$/ms, File.read!("docs/gleam.md"))
      assert output == shown
      assert %{} = VivaTensor.Checkpoint.open!(Path.join(project, "viva-tiny-nf4"))
    end
  end
end

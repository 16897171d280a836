defmodule VivaTensor.PackageTest do
  # Compiles the package in a directory of its own.
  use ExUnit.Case, async: true

  alias VivaTensor.Test.Directory

  # As Hex lists them: files, and directories with everything in them.
  defp files do
    Mix.Project.config()[:package][:files]
    |> Enum.flat_map(fn path ->
      assert File.exists?(path), "#{path} is in the package and not here"
      if File.dir?(path), do: Path.wildcard("#{path}/**", match_dot: true), else: [path]
    end)
    |> Enum.filter(&File.regular?/1)
  end

  test "it has what Hex asks for" do
    project = Mix.Project.config()
    assert String.length(project[:description]) in 1..300
    assert project[:package][:licenses] == ["Apache-2.0"]
    assert File.read!("LICENSE") =~ "Apache License"
  end

  test "nothing is in it that a build leaves behind, or that is large" do
    for file <- files() do
      refute file =~ ~r"(^|/)(target|_build|priv|fuzz|golden)/", file
      refute Path.extname(file) in ~w(.so .beam .safetensors .tar), file
    end
  end

  @tag timeout: 900_000
  test "its Elixir compiles by itself, and quantizes" do
    dir = Directory.create!()

    # The library is the one that is loaded here: cargo would take minutes.
    for file <- ["priv/native/viva_nif.so" | files()] do
      to = Path.join(dir, file)
      to |> Path.dirname() |> File.mkdir_p!()
      File.cp!(file, to)
    end

    code = """
    tensor = VivaTensor.Tensor.from_list!([0.5, -1.0, 0.25, 1.0], :f32, [2, 2])
    IO.inspect(VivaTensor.quantize!(tensor, :int8))
    """

    {output, status} =
      System.cmd(System.find_executable("mix"), ["run", "--no-deps-check", "-e", code],
        cd: dir,
        env: [{"MIX_ENV", "prod"}, {"VIVA_TENSOR_SKIP_BUILD", "1"}],
        stderr_to_stdout: true
      )

    assert status == 0, output
    assert output =~ "#VivaTensor.Quantized<int8[2, 2] from f32"
    refute output =~ "warning:"
  end

  test "its Rust has everything that the manifests and the sources name" do
    files = MapSet.new(files())
    manifests = Enum.filter(files, &(Path.basename(&1) == "Cargo.toml"))
    assert [workspace] = manifests -- (manifests = Enum.filter(manifests, &(&1 =~ "/")))
    [_, members] = Regex.run(~r/^members = \[(.*)\]$/m, File.read!(workspace))
    crates = for [member] <- Regex.scan(~r/(?<=")[^",]+(?=")/, members), do: member
    assert Enum.sort(Enum.map(crates, &Path.join(&1, "Cargo.toml"))) == Enum.sort(manifests)

    for crate <- crates do
      assert Path.join(crate, "src/lib.rs") in files
      manifest = File.read!(Path.join(crate, "Cargo.toml"))

      for [_, kind, name] <- Regex.scan(~r/^\[\[(\w+)\]\]\nname = "(\w+)"$/m, manifest) do
        at = Path.join(crate, %{"bench" => "benches", "example" => "examples"}[kind])
        places = [Path.join(at, name <> ".rs"), Path.join([at, name, "main.rs"])]
        assert Enum.any?(places, &(&1 in files)), "#{kind} #{name}"
      end
    end

    for file <- files, Path.extname(file) == ".rs" do
      named = ~r/(?:include(?:_str|_bytes)?!\(\s*|#\[path = )"([^"]+)"/

      for [_, path] <- Regex.scan(named, File.read!(file)) do
        path = path |> Path.expand(Path.dirname(file)) |> Path.relative_to_cwd()
        assert path in files, "#{file} includes #{path}"
      end
    end
  end

  test "the version is stated once, in the workspace" do
    version = Mix.Project.config()[:version]
    assert File.read!("Cargo.toml") =~ ~s(\n[workspace.package]\nversion = "#{version}"\n)
    refute File.read!("mix.exs") =~ version

    lock = File.read!("Cargo.lock")

    for crate <- ~w(viva_core viva_nif) do
      assert File.read!("native/#{crate}/Cargo.toml") =~ "\nversion.workspace = true\n"
      assert lock =~ ~s(name = "#{crate}"\nversion = "#{version}"\n)
    end

    assert File.read!("CHANGELOG.md") =~ ~r/^## \[(Unreleased|#{Regex.escape(version)})\]/m
  end
end

Code.require_file("precompiled.exs", __DIR__)

defmodule Mix.Tasks.Compile.VivaNative do
  @moduledoc """
  Builds the NIF library with cargo and puts it into `priv/native`, or takes the one of
  a release: see `VivaTensor.Precompiled`.

  Cargo decides what is out of date, so this task calls it every time; its
  messages go straight to the terminal. The library is replaced only when its
  bytes changed, and by a rename: a running VM keeps the file that it mapped.

  With `VIVA_TENSOR_SKIP_BUILD=1` the library that is already in `priv/native`
  is used and no Rust is needed. `mix clean` removes the library and leaves
  cargo's `target`, which `cargo clean` empties.
  """

  use Mix.Task.Compiler

  alias VivaTensor.Precompiled

  @sources ["Cargo.{toml,lock}", "native/*/Cargo.toml", "native/*/src/**/*.rs"]

  @impl true
  def run(_args) do
    config = Mix.Project.config()[:viva_native]
    library = library(config)

    status =
      if skip_build?(),
        do: use_prebuilt(library),
        else: config |> bytes(library) |> install(library)

    # Mix links priv into _build before it runs the compilers, when on a first
    # build there is none yet.
    Mix.Project.build_structure()
    {status, []}
  end

  @impl true
  def clean do
    if not skip_build?(), do: File.rm(library(Mix.Project.config()[:viva_native]))
    :ok
  end

  defp skip_build?, do: System.get_env("VIVA_TENSOR_SKIP_BUILD") in ["1", "true"]

  defp use_prebuilt(library) do
    if not File.regular?(library) do
      Mix.raise("""
      VIVA_TENSOR_SKIP_BUILD is set, but there is no prebuilt library at

          #{Path.expand(library)}

      Put the library of this version there, or unset the variable to build it with cargo.\
      """)
    end

    :noop
  end

  defp bytes(config, library) do
    version = Mix.Project.config()[:version]
    Precompiled.bytes(config[:crate], version, library) || File.read!(cargo_build(config))
  end

  defp cargo_build(config) do
    built = Path.join("target/release", built_name(config[:crate]))
    args = ~w(build --release --locked --package #{config[:crate]} --target-dir target)

    args =
      if Mix.Utils.stale?(Enum.flat_map(@sources, &Path.wildcard/1), [built]) do
        check_rust(config)
        args
      else
        # "Finished" on every mix command would say nothing.
        args ++ ["--quiet"]
      end

    # Cargo reports on standard error, which it inherits from this VM: its
    # progress is seen as it happens and never mixes with a task's output.
    case System.cmd(tool("cargo", config), args) do
      {_output, 0} -> built
      {_output, code} -> Mix.raise("cargo could not build the native library (exit code #{code})")
    end
  end

  defp check_rust(config) do
    required = config[:rust_version]
    {output, _code} = System.cmd(tool("rustc", config), ["--version"])

    case Regex.run(~r/\d+\.\d+\.\d+/, output) do
      [found] ->
        if Version.compare(found, required <> ".0") == :lt,
          do: Mix.raise("rustc #{found} is too old. " <> advice(required))

      nil ->
        Mix.raise("rustc does not tell its version. " <> advice(required))
    end
  end

  # Rustup's own order: its tools come before those of the system, on PATH or not.
  defp tool(name, config) do
    cargo_home = System.get_env("CARGO_HOME") || Path.expand("~/.cargo")

    System.find_executable(Path.join([cargo_home, "bin", name])) ||
      System.find_executable(name) ||
      Mix.raise("#{name} was not found. " <> advice(config[:rust_version]))
  end

  defp advice(rust_version) do
    "The native library needs Rust #{rust_version} or later: install it from " <>
      "https://rustup.rs (with rustup there, run `rustup update`), or set " <>
      "VIVA_TENSOR_SKIP_BUILD=1 to use a library that was built elsewhere."
  end

  defp install(bytes, library) do
    case File.read(library) do
      {:ok, ^bytes} ->
        :noop

      _other ->
        temporary = "#{library}.#{System.pid()}"
        File.mkdir_p!(Path.dirname(library))
        File.write!(temporary, bytes)
        File.rename!(temporary, library)
        :ok
    end
  end

  # :erlang.load_nif/2 appends ".dll" on Windows and ".so" everywhere else.
  defp library(config) do
    Path.join("priv/native", config[:crate] <> if(windows?(), do: ".dll", else: ".so"))
  end

  defp built_name(crate) do
    case :os.type() do
      {:win32, _name} -> "#{crate}.dll"
      {:unix, :darwin} -> "lib#{crate}.dylib"
      {:unix, _name} -> "lib#{crate}.so"
    end
  end

  defp windows?, do: match?({:win32, _name}, :os.type())
end

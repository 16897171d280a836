defmodule VivaTensor.PrecompiledTest do
  # Each test has a project, and a server, of its own.
  use ExUnit.Case, async: true

  alias VivaTensor.Precompiled
  alias VivaTensor.Test.Directory

  @moduletag timeout: 600_000
  @version "1.2.3"
  @library "priv/native/small_nif.so"

  @project """
  Code.require_file("native/mix_compiler.exs", __DIR__)

  defmodule Small.MixProject do
    use Mix.Project

    def project do
      [
        app: :small,
        version: "#{@version}",
        compilers: [:viva_native],
        viva_native: [crate: "small_nif", rust_version: "1.0"]
      ]
    end
  end
  """

  # Stands for cargo, which would take minutes.
  @cargo """
  #!/bin/sh
  mkdir -p target/release
  printf 'built here' > target/release/libsmall_nif.so
  """

  setup do
    dir = Directory.create!()
    for path <- ~w(native cargo/bin), do: dir |> Path.join(path) |> File.mkdir_p!()

    for file <- ~w(mix_compiler.exs precompiled.exs checksums.txt),
        do: File.cp!("native/#{file}", Path.join([dir, "native", file]))

    File.write!(Path.join(dir, "mix.exs"), @project)

    for {tool, script} <- [cargo: @cargo, rustc: "#!/bin/sh\necho rustc 1.91.0\n"] do
      path = Path.join([dir, "cargo/bin", to_string(tool)])
      File.write!(path, script)
      File.chmod!(path, 0o755)
    end

    {:ok, dir: dir}
  end

  defp compile(dir, env \\ []) do
    env = [{"CARGO_HOME", Path.join(dir, "cargo")}, {"VIVA_TENSOR_SKIP_BUILD", nil} | env]
    options = [cd: dir, env: env, stderr_to_stdout: true]
    System.cmd(System.find_executable("mix"), ["compile.viva_native"], options)
  end

  # A server that answers every request so, and tells of each.
  defp serve(status, body) do
    options = [:binary, active: false, packet: :http_bin, ip: {127, 0, 0, 1}]
    {:ok, socket} = :gen_tcp.listen(0, options)
    {:ok, port} = :inet.port(socket)
    test = self()
    answer = "HTTP/1.1 #{status}\r\ncontent-length: #{byte_size(body)}\r\n\r\n#{body}"
    start_supervised!({Task, fn -> answer_all(socket, answer, test) end})
    "http://127.0.0.1:#{port}"
  end

  defp answer_all(socket, answer, test) do
    {:ok, connection} = :gen_tcp.accept(socket)
    {:ok, {:http_request, :GET, {:abs_path, path}, _version}} = :gen_tcp.recv(connection, 0)
    send(test, {:asked, Path.basename(path)})
    drop_headers(connection)
    :ok = :gen_tcp.send(connection, answer)
    :gen_tcp.close(connection)
    answer_all(socket, answer, test)
  end

  defp drop_headers(connection) do
    case :gen_tcp.recv(connection, 0) do
      {:ok, :http_eoh} -> :ok
      {:ok, _header} -> drop_headers(connection)
    end
  end

  defp name do
    target = Precompiled.target(to_string(:erlang.system_info(:system_architecture)))
    "small_nif-#{@version}-#{target}.so"
  end

  defp sha256(bytes), do: :sha256 |> :crypto.hash(bytes) |> Base.encode16(case: :lower)

  defp list(dir, sha256, url) do
    dir
    |> Path.join("native/checksums.txt")
    |> File.write!("#{sha256}  #{url}/v#{@version}/#{name()}\n", [:append])
  end

  defp installed(dir), do: dir |> Path.join(@library) |> File.read()

  test "a library with the right checksum is installed, and fetched once", %{dir: dir} do
    list(dir, sha256("of a release"), serve("200 OK", "of a release"))
    assert {output, 0} = compile(dir)
    assert output =~ ~r"Fetched http://127.0.0.1:\d+/v1.2.3/small_nif-1.2.3-"
    assert installed(dir) == {:ok, "of a release"}
    assert_received {:asked, name}
    assert name == name()

    assert {"", 0} = compile(dir)
    refute_received {:asked, _}
  end

  test "one with another checksum is refused", %{dir: dir} do
    list(dir, sha256("of a release"), serve("200 OK", "of somebody else"))
    assert {output, code} = compile(dir)
    assert code != 0
    assert output =~ "is not what it was when this version was released"
    assert output =~ sha256("of a release") and output =~ sha256("of somebody else")
    assert output =~ "VIVA_TENSOR_BUILD=1"
    assert installed(dir) == {:error, :enoent}

    assert {_, 0} = compile(dir, [{"VIVA_TENSOR_BUILD", "1"}])
    assert installed(dir) == {:ok, "built here"}
  end

  test "without an entry cargo builds", %{dir: dir} do
    assert {"", 0} = compile(dir)
    assert installed(dir) == {:ok, "built here"}
  end

  test "what cannot be fetched is built", %{dir: dir} do
    list(dir, sha256("of a release"), serve("404 Not Found", "nothing here"))
    assert {output, 0} = compile(dir)
    assert output =~ "cannot be fetched (HTTP status 404): cargo builds the library"
    assert installed(dir) == {:ok, "built here"}
  end

  test "a server that is not there is no obstacle", %{dir: dir} do
    {:ok, socket} = :gen_tcp.listen(0, [])
    {:ok, port} = :inet.port(socket)
    :gen_tcp.close(socket)
    list(dir, sha256("of a release"), "http://127.0.0.1:#{port}")
    assert {output, 0} = compile(dir)
    assert output =~ "cannot be fetched"
    assert installed(dir) == {:ok, "built here"}
  end

  test "a checkout of the repository is built", %{dir: dir} do
    File.mkdir_p!(Path.join(dir, ".git"))
    list(dir, sha256("of a release"), serve("200 OK", "of a release"))
    assert {"", 0} = compile(dir)
    assert installed(dir) == {:ok, "built here"}
    refute_received {:asked, _}
  end

  test "machines have the targets that Rust calls them by" do
    for {architecture, target} <- [
          {"x86_64-pc-linux-gnu", "x86_64-unknown-linux-gnu"},
          {"x86_64-alpine-linux-musl", "x86_64-unknown-linux-musl"},
          {"aarch64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"},
          {"arm64-unknown-linux-musl", "aarch64-unknown-linux-musl"},
          {"aarch64-apple-darwin24.1.0", "aarch64-apple-darwin"},
          {"x86_64-apple-darwin21.6.0", "x86_64-apple-darwin"},
          {"armv7l-unknown-linux-gnueabihf", nil},
          {"amd64-portbld-freebsd14.1", nil},
          {"win32", nil}
        ] do
      assert {architecture, Precompiled.target(architecture)} == {architecture, target}
    end
  end

  test "a release has a library for each of them" do
    workflow = File.read!(".github/workflows/release.yml")
    built = for [_, target] <- Regex.scan(~r/^ +- target: (\S+)$/m, workflow), do: target
    assert Enum.sort(built) == Enum.sort(Precompiled.targets())
  end
end

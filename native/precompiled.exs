defmodule VivaTensor.Precompiled do
  @moduledoc """
  The library that a release has for this machine, in place of one built here.

  `native/checksums.txt` says where it is and what it hashes to. There is none, and
  cargo builds, for a version or a machine that is not in it, in a checkout of the
  repository, whose sources may be others, with `VIVA_TENSOR_BUILD=1`, and when it
  cannot be fetched. What was fetched and is not what the checksum says is never used.
  """

  @checksums "native/checksums.txt"
  @targets ~w(x86_64-unknown-linux-gnu x86_64-unknown-linux-musl x86_64-apple-darwin) ++
             ~w(aarch64-unknown-linux-gnu aarch64-unknown-linux-musl aarch64-apple-darwin)
  @connect_ms 30_000
  @fetch_ms 600_000

  @doc "The targets for which a release has a library."
  @spec targets() :: [String.t()]
  def targets, do: @targets

  @doc "The bytes of the library, if there is one to use; `installed` is where it may be already."
  @spec bytes(String.t(), String.t(), Path.t()) :: binary | nil
  def bytes(crate, version, installed) do
    with false <- System.get_env("VIVA_TENSOR_BUILD") in ["1", "true"],
         false <- File.exists?(".git"),
         target when target != nil <- target(architecture()),
         {sha256, url} <- entry(File.read(@checksums), "#{crate}-#{version}-#{target}.so") do
      kept(File.read(installed), sha256) || fetched(url, sha256)
    else
      _ -> nil
    end
  end

  @doc "The target of an Erlang's system architecture, or `nil` for one without releases."
  @spec target(String.t()) :: String.t() | nil
  def target(architecture) do
    [cpu | rest] = String.split(architecture, "-")
    cpu = %{"amd64" => "x86_64", "arm64" => "aarch64"}[cpu] || cpu
    rest = Enum.join(rest, "-")

    system =
      cond do
        rest =~ "darwin" -> "apple-darwin"
        rest =~ ~r/linux-musl$/ -> "unknown-linux-musl"
        rest =~ ~r/linux(-gnu)?$/ -> "unknown-linux-gnu"
        true -> nil
      end

    Enum.find(@targets, &(&1 == "#{cpu}-#{system}"))
  end

  defp architecture, do: to_string(:erlang.system_info(:system_architecture))

  defp entry({:error, _reason}, _name), do: nil

  defp entry({:ok, checksums}, name) do
    Enum.find_value(String.split(checksums, "\n"), fn line ->
      case String.split(line) do
        [sha256, url] -> if Path.basename(url) == name, do: {sha256, url}
        _comment -> nil
      end
    end)
  end

  defp kept({:ok, bytes}, sha256), do: if(sha256(bytes) == sha256, do: bytes)
  defp kept({:error, _reason}, _sha256), do: nil

  defp fetched(url, sha256) do
    case fetch(url) do
      {:ok, bytes} ->
        verified(bytes, sha256(bytes), sha256, url)

      {:error, reason} ->
        Mix.shell().info("#{url} cannot be fetched (#{reason}): cargo builds the library")
        nil
    end
  end

  defp verified(bytes, sha256, sha256, url) do
    Mix.shell().info("Fetched #{url}")
    bytes
  end

  defp verified(_bytes, found, expected, url) do
    Mix.raise("""
    #{url} is not what it was when this version was released, and is not used:

        expected SHA-256 #{expected}
        got              #{found}

    VIVA_TENSOR_BUILD=1 builds the library from the sources of this package instead.\
    """)
  end

  defp sha256(bytes), do: :sha256 |> :crypto.hash(bytes) |> Base.encode16(case: :lower)

  defp fetch(url) do
    Enum.each([:inets, :ssl, :public_key], &start/1)
    http = [timeout: @fetch_ms, connect_timeout: @connect_ms] ++ tls(URI.parse(url))

    case :httpc.request(:get, {to_charlist(url), []}, http, body_format: :binary) do
      {:ok, {{_http, 200, _ok}, _headers, bytes}} -> {:ok, bytes}
      {:ok, {{_http, code, _reason}, _headers, _body}} -> {:error, "HTTP status #{code}"}
      {:error, reason} -> {:error, inspect(reason)}
    end
  rescue
    # An Erlang without these applications, or a machine without certificates.
    error in [ErlangError, MatchError, Mix.Error, UndefinedFunctionError] ->
      {:error, Exception.message(error)}
  end

  # Newer versions of Mix show a project no applications but its own.
  defp start(application) do
    if function_exported?(Mix, :ensure_application!, 1),
      do: apply(Mix, :ensure_application!, [application])

    {:ok, _} = Application.ensure_all_started(application)
  end

  defp tls(%URI{scheme: "https"}) do
    match = :public_key.pkix_verify_hostname_match_fun(:https)

    [
      ssl: [
        verify: :verify_peer,
        cacerts: :public_key.cacerts_get(),
        customize_hostname_check: [match_fun: match]
      ]
    ]
  end

  # Newer versions of httpc look for certificates even where none is needed.
  defp tls(_http), do: [ssl: []]
end

Code.require_file("native/mix_compiler.exs", __DIR__)

defmodule VivaTensor.MixProject do
  use Mix.Project

  # The workspace's Cargo.toml is the one place that states the version of the
  # project and the oldest Rust that builds it.
  @workspace File.read!(Path.join(__DIR__, "Cargo.toml"))

  # Nx, Axon and Bumblebee that were built without Mix: their ebin directories.
  @nx_ebin "VIVA_TENSOR_NX_EBIN" |> System.get_env("") |> String.split(":", trim: true)
  Enum.each(@nx_ebin, &Code.prepend_path/1)

  @guides ~w(getting-started getting-started.zh-CN choosing-a-format) ++
            ~w(compressing-a-checkpoint calibrating embeddings running-a-cluster) ++
            ~w(from-python internals)

  def project do
    [
      app: :viva_tensor,
      version: workspace("version"),
      elixir: "~> 1.14",
      start_permanent: Mix.env() == :prod,
      elixirc_paths: elixirc_paths(Mix.env()),
      # Scripts, not tests.
      test_ignore_filters: [&String.starts_with?(&1, ["test/oracle/", "test/faults/"])],
      compilers: [:viva_native | Mix.compilers()],
      viva_native: [crate: "viva_nif", rust_version: workspace("rust-version")],
      # Mix would take them off again, as no dependency is there.
      prune_code_paths: @nx_ebin == [],
      deps: deps(Code.ensure_loaded?(Hex)),
      description:
        "Compresses the weights of neural networks, supervised by OTP, computed in Rust",
      package: package(),
      docs: docs()
    ]
  end

  def application do
    [
      mod: {VivaTensor.Application, []},
      extra_applications: [:logger, :crypto]
    ]
  end

  defp elixirc_paths(:test), do: ["lib", "test/support"]
  defp elixirc_paths(_env), do: ["lib"]

  # All of them are optional, so that without Hex there is nothing to fetch and
  # Mix neither asks for Hex nor for the network.
  defp deps(_hex? = true) do
    [
      {:nx, "~> 0.7", optional: true},
      {:telemetry, "~> 1.0", optional: true},
      {:ex_doc, "~> 0.30", only: :dev, runtime: false}
    ]
  end

  defp deps(_hex? = false), do: []

  # What builds, with what its manifests name, and no more.
  defp package do
    [
      licenses: ["Apache-2.0"],
      links: links(System.get_env("GITHUB_REPOSITORY")),
      files:
        ~w(lib native/mix_compiler.exs native/precompiled.exs native/checksums.txt) ++
          ~w(native/viva_core/Cargo.toml native/viva_core/src native/viva_core/benches) ++
          ~w(native/viva_core/examples native/viva_core/tests/support) ++
          ~w(native/viva_nif/Cargo.toml native/viva_nif/src) ++
          ~w(.cargo Cargo.toml Cargo.lock mix.exs .formatter.exs) ++
          ~w(bench/quality_bars.json bench/results/reference_quality.json) ++
          ~w(README.md CHANGELOG.md LICENSE)
    ]
  end

  # A package is made where the repository is, by .github/workflows/release.yml.
  defp links(nil), do: %{}
  defp links(repository), do: %{"GitHub" => "https://github.com/#{repository}"}

  defp docs do
    [
      main: "readme",
      extras:
        [
          "README.md",
          {"README.zh-CN.md", title: "viva_tensor（简体中文）"}
          | Enum.map(@guides, &"docs/guides/#{&1}.md")
        ] ++
          ["docs/cheatsheet.cheatmd" | Path.wildcard("notebooks/*.livemd")] ++
          ["docs/formats.md" | Path.wildcard("docs/formats/*.md")] ++
          ["docs/methods.md", "docs/layouts.md", "docs/jobs.md", "docs/vectors.md"] ++
          ["docs/nx.md", "docs/gleam.md", "docs/erlang.md"] ++
          ["docs/kernels.md"] ++
          ["docs/adding-a-format.md"] ++
          ["CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"],
      groups_for_extras: [
        Guides: ~r"docs/guides",
        Notebooks: ~r"notebooks/",
        Reference: ~r"docs/[^/]+\.md$",
        Formats: ~r"docs/formats/"
      ],
      groups_for_modules: modules(),
      before_closing_body_tag: &before_closing_body_tag/1
    ]
  end

  # Modules that are not for users have no pages.
  defp modules do
    [
      Tensors: [VivaTensor | in_order(~w(Tensor Quantized Packed Checkpoint Calibration Error))],
      Jobs: in_order(~w(Job Job.Status Job.Queue Recipe Conversion Report Telemetry Application)),
      Measuring: in_order(~w(Compare Plan Plot Page Table Size)),
      Vectors: in_order(~w(Vectors Vectors.Recipe Vectors.Report)),
      Nx: in_order(~w(Nx Axon Bumblebee Bumblebee.Weight))
    ]
  end

  defp in_order(names), do: Enum.map(names, &Module.concat(VivaTensor, &1))

  # Diagrams are drawn in the browser.
  defp before_closing_body_tag(:html) do
    """
    <script defer src="https://cdn.jsdelivr.net/npm/mermaid@11/dist/mermaid.min.js"></script>
    <script>
      let diagrams = 0;
      const draw = () => {
        const dark = document.body.className.includes("dark");
        mermaid.initialize({ startOnLoad: false, theme: dark ? "dark" : "default" });
        document.querySelectorAll("pre code.mermaid").forEach(async (code) => {
          code.classList.remove("mermaid");
          const { svg } = await mermaid.render("diagram-" + ++diagrams, code.textContent);
          const figure = document.createElement("figure");
          figure.innerHTML = svg;
          code.parentElement.replaceWith(figure);
        });
      };
      addEventListener("DOMContentLoaded", draw);
      addEventListener("exdoc:loaded", draw);
    </script>
    """
  end

  defp before_closing_body_tag(_epub), do: ""

  defp workspace(key) do
    [_line, value] = Regex.run(~r/^#{key} = "(.+)"$/m, @workspace)
    value
  end
end

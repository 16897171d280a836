defmodule VivaTensor.Native do
  @moduledoc false
  # Stubs that the NIF library replaces; no logic lives here. Fallible ones
  # return {:ok, value} | {:error, {kind, details, message}}.

  @on_load :load

  @doc false
  def load do
    :viva_tensor
    |> :code.priv_dir()
    |> Path.join("native/viva_nif")
    |> String.to_charlist()
    |> :erlang.load_nif(0)
  end

  stubs = [
    version: [],
    configure: [:threads],
    cpu: [],
    memory_info: [],
    formats: [],
    layouts: [],
    cancel_flag: [],
    cancel: [:flag],
    cancel_calls: [:flag],
    json_encode: [:term, :pretty],
    json_decode: [:text],
    tensor_from_binary_in_place: [:binary, :dtype, :shape],
    tensor_from_list: [:list, :dtype, :shape],
    tensor_to_binary: [:tensor],
    tensor_to_list: [:tensor],
    tensor_cast: [:tensor, :dtype],
    tensor_sparsify: [:x, :scores],
    tensor_metrics: [:x, :y],
    tensor_output_error: [:w, :y, :x],
    tensor_release: [:tensor],
    quantize: [:tensor, :format, :options],
    sparsify_calibrated: [:tensor, :options, :calibration, :layer],
    quantize_calibrated: [:tensor, :format, :options, :calibration, :layer],
    calibration_new: [:samples],
    calibration_add: [:calibration, :layer, :x],
    calibration_merge: [:calibration, :other],
    calibration_save: [:calibration, :path],
    calibration_load: [:path],
    calibration_layers: [:calibration],
    calibration_samples: [:calibration, :layer],
    observed_copy: [:calibration],
    observed_open: [:path],
    observed_layers: [:observed],
    fold_groups: [:checkpoint, :spec, :quantized],
    fold_search: [:observed, :checkpoint, :spec, :group, :cancel],
    fold_use: [:observed, :checkpoint, :group, :scales],
    dequantize: [:quantized, :dtype],
    matmul: [:x, :quantized, :epilogue, :compute],
    matmul_small: [:x, :quantized, :epilogue, :compute],
    prepack: [:quantized],
    matmul_packed: [:x, :packed, :epilogue],
    matmul_packed_small: [:x, :packed, :epilogue],
    packed_release: [:packed],
    quantized_metrics: [:x, :quantized],
    quantized_histogram: [:x, :quantized],
    quantized_output_error: [:w, :quantized, :x],
    quantized_dump: [:quantized],
    quantized_load: [:binary],
    quantized_release: [:quantized],
    checkpoint_open: [:path],
    checkpoint_contents: [:checkpoint],
    checkpoint_get: [:checkpoint, :name],
    checkpoint_release: [:checkpoint],
    spec_new: [:format, :options, :layout],
    plan_source: [:spec, :checkpoint],
    plan_tensor: [:spec, :name, :shape, :dtype],
    config_files: [:spec, :config, :kept],
    conversion_check: [:layout, :dtype],
    conversion_plan: [:checkpoint, :layout, :dtype, :outer],
    conversion_shard: [:path, :mark, :conversion, :names, :checkpoint, :metadata],
    conversion_files: [:conversion, :checkpoint, :kept],
    output_open: [:target, :force, :protected],
    output_create: [:target, :force, :protected],
    output_found: [:output],
    output_manifest: [:target],
    output_locked: [:directory],
    output_record: [:output, :shards, :at, :records],
    output_release: [:output],
    output_path: [:output],
    output_carry: [:output, :file, :relative],
    output_write: [:output, :relative, :bytes],
    output_commit: [:output],
    output_abort: [:output],
    shard_create: [:path, :mark, :spec, :tensors, :checkpoint, :metadata],
    shard_finish: [:shard],
    shard_index: [:shards],
    plan_shards: [:sizes, :max_shard_size],
    shard_name: [:index, :count],
    unit_quantize: [:checkpoint, :name, :spec, :observed, :shard, :cancel],
    unit_keep: [:checkpoint, :name, :spec, :observed, :shard, :cancel],
    unit_convert: [:checkpoint, :name, :conversion, :shard, :cancel],
    shard_mark: [:shard],
    shard_sync: [:shard],
    source_hash: [:checkpoint, :names],
    unit_accept: [:shard, :parts],
    unit_verify: [:shard, :parts, :cancel],
    unit_source_hash: [:checkpoint, :name, :conversion],
    file_identity: [:path],
    file_hash: [:path],
    matrix_open: [:path, :tensor],
    matrix_rows: [:matrix, :first, :count],
    matrix_give_back: [:matrix, :first, :count],
    matrix_sample: [:matrix, :most],
    vectors_settings: [:settings],
    vectors_create: [:output, :settings, :sample, :ids, :queries, :rows],
    vectors_write: [:writer, :first, :vectors, :cancel],
    vectors_verify: [:writer, :first, :count, :piece, :cancel],
    vectors_source_hash: [:vectors],
    vectors_sync: [:writer],
    vectors_finish: [:writer, :rows],
    vectors_recall: [:writer, :oversample, :cancel],
    vectors_open: [:path],
    vectors_search: [:vectors, :queries, :most, :candidates, :hamming],
    vectors_release: [:vectors]
  ]

  for {name, args} <- stubs do
    args = Enum.map(args, &Macro.var(:"_#{&1}", __MODULE__))
    def unquote(name)(unquote_splicing(args)), do: :erlang.nif_error(:nif_not_loaded)
  end
end

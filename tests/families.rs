//! Every family of models, and every parameterization in a family with biases and norms of queries and keys.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor, TensorData};
use lowrank_models::hub::{self, FileType, FileTypes, ModelFolder};
use lowrank_models::linear::PARAMETERIZATIONS;
use lowrank_models::{
    Family, Features, HeadNorms, LanguageBatch, Llama, LlamaConfig, MatrixStorage, Parameterization, RandomWeights,
    RopeScaling, Sampling, generate, ids_tensor,
};
use lowrank_optim::AdamWConfig;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::{Map, json};

mod small_families;
use small_families::{config, model};

fn ids(count: usize) -> Vec<i32> {
    (0..count).map(|i| ((i * i * 7 + 3 * i + 5) % 50) as i32).collect()
}

fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().try_into_vec().expect("f32")
}

fn logits(model: &Llama, ids: &[i32]) -> Vec<f32> {
    host(model.logits(ids_tensor(ids, 1, &Device::default()), None))
}

fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Elements of the parameters by their paths.
fn parameters(model: &Llama) -> BTreeMap<String, Vec<f32>> {
    struct Collect {
        path: lowrank_optim::ModulePath,
        found: BTreeMap<String, Vec<f32>>,
    }
    impl ModuleVisitor for Collect {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }

        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.exit();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.found.insert(self.path.joined(), host(param.val().inner()));
        }
    }
    let mut collect = Collect { path: Default::default(), found: BTreeMap::new() };
    model.visit(&mut collect);
    collect.found
}

#[test]
fn a_family_is_written_and_read_back_and_counts_its_parameters() {
    for family in Family::ALL {
        let config = config(family);
        let model = model(&config, &Device::default());
        let counted: usize = parameters(&model).values().map(Vec::len).sum();
        assert_eq!(config.parameters(), counted, "{family:?}");
        let dir = tempfile::tempdir().expect("a folder");
        let extra = Map::from_iter([("eos_token_id".to_string(), json!(2))]);
        hub::save(&model, &extra, dir.path(), 4000).unwrap();
        let folder = ModelFolder::open(dir.path()).unwrap();
        assert_eq!((&folder.config.llama, &folder.config.extra), (&config, &extra));
        assert_eq!(logits(&folder.load(&Device::default()).unwrap(), &ids(9)), logits(&model, &ids(9)), "{family:?}");
    }
}

#[test]
fn what_the_files_of_a_family_cannot_say_is_not_written() {
    for (family, features) in [
        (Family::Llama, Features { sliding_window: Some(3), ..Features::default() }),
        (Family::Llama, Features { head_norms: Some(HeadNorms::EachHead), ..Features::default() }),
        (Family::Llama, Features { output_bias: true, ..Features::default() }),
        (Family::Qwen2, Features { qkv_bias: false, ..Family::Qwen2.features() }),
        (Family::Mistral, Features { sliding_window: Some(3), full_layers: vec![1], ..Features::default() }),
        (Family::Olmo2, Features { logits_scaling: Some(2.0), ..Family::Olmo2.features() }),
    ] {
        let config = LlamaConfig { features, ..config(family) };
        let dir = tempfile::tempdir().expect("a folder");
        let refusal = hub::save(&model(&config, &Device::default()), &Map::new(), dir.path(), u64::MAX).unwrap_err();
        assert!(refusal.is_input(), "{refusal}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "{refusal}");
    }
}

/// Continues beyond every window; the cache of a layer with a window never holds more than the window.
#[test]
fn cached_generation_equals_whole_passes_in_every_family() {
    for family in Family::ALL {
        for window in [None, Some(1), Some(2), Some(5), Some(30)] {
            let mut config = config(family);
            if let (Some(own), Some(window)) = (&mut config.features.sliding_window, window) {
                *own = window;
            } else if window.is_some() {
                continue;
            }
            let model = model(&config, &Device::default());
            for prompt in [1, 4, 9] {
                let mut all = ids(prompt);
                for token in generate(&model, &ids(prompt), 12, &Sampling::greedy(), |_| true).unwrap() {
                    let rows = logits(&model, &all);
                    let last = &rows[rows.len() - 50..];
                    let best = (0..50).max_by(|a, b| last[*a].total_cmp(&last[*b]).then(b.cmp(a)));
                    assert_eq!(best, Some(token as usize), "{family:?}, window {window:?}, after {} tokens", all.len());
                    all.push(token);
                }
            }
        }
    }
}

/// Documents packed in a row see neither each other nor beyond the window. Angles depend on distances alone, those of a dynamic base on the
/// length of the row as well.
#[test]
fn documents_in_a_row_are_computed_as_if_alone() {
    for family in Family::ALL {
        let model = model(&config(family), &Device::default());
        let (first, second) = (ids(7), ids(11)[2..].to_vec());
        let row = [first.clone(), second.clone()].concat();
        let starts: Vec<i32> = (0..row.len()).map(|place| if place < 7 { 0 } else { 7 }).collect();
        let device = Device::default();
        let starts: Tensor<2, Int> = Tensor::from_data(TensorData::new(starts, [1, row.len()]), &device);
        let packed = host(model.logits(ids_tensor(&row, 1, &device), Some(starts)));
        let alone = [logits(&model, &first), logits(&model, &second)].concat();
        assert!(apart(&packed, &alone) < 1e-4, "{family:?}: {}", apart(&packed, &alone));
    }
}

/// The definition of a window: what lies before it cannot change the output.
#[test]
fn a_window_ends_what_a_token_sees() {
    let mut config = config(Family::Mistral);
    config.num_hidden_layers = 1;
    let model = model(&config, &Device::default());
    let (mut changed, whole) = (ids(9), ids(9));
    changed[5] = 49 - changed[5];
    let rows = |ids: &[i32]| logits(&model, ids).chunks(50).map(<[f32]>::to_vec).collect::<Vec<_>>();
    let differs: Vec<bool> = rows(&whole).iter().zip(rows(&changed)).map(|(a, b)| *a != b).collect();
    // A window of three: the token itself and the two after it.
    assert_eq!(differs, [false, false, false, false, false, true, true, true, false]);
}

#[test]
fn every_parameterization_trains_and_is_exported_with_biases_and_norms_of_queries_and_keys() {
    for entry in PARAMETERIZATIONS {
        let name = entry.spec().name;
        let rank = entry.spec().options().get("rank").is_some().then(|| ("rank".to_string(), json!(3)));
        let parameterization = entry.parse(&rank.into_iter().collect()).unwrap();
        let config = LlamaConfig { parameterization, ..config(Family::Qwen3) };
        let device = Device::default().autodiff();
        let mut trained = model(&config, &device);
        let before = parameters(&trained);
        let mut optimizer = AdamWConfig::new().init();
        let batch = LanguageBatch {
            inputs: ids_tensor(&ids(12), 2, &Device::default()),
            targets: ids_tensor(&ids(13)[1..], 2, &Device::default()),
            starts: None,
        };
        for _ in 0..2 {
            let grads = trained.mean_loss(batch.clone()).backward();
            let grads = GradientsParams::from_grads(grads, &trained);
            trained = optimizer.step(0.01, trained, grads);
        }
        let after = parameters(&trained);
        let moved = |path: &&String| before[*path] != after[*path];
        let still: Vec<&String> = before.keys().filter(|path| !moved(path)).collect();
        let frozen = name == "relora";
        assert!(still.iter().all(|path| frozen && path.contains("_proj.weight")), "{name}: {still:?} did not move");
        let values: usize = after.values().map(Vec::len).sum();
        let bases = if frozen { config.block_shapes().map(|[d_in, d_out]| d_in * d_out).sum::<usize>() * 2 } else { 0 };
        assert_eq!(values - bases, config.parameters(), "{name}");
        let valid = trained.valid();
        let dir = tempfile::tempdir().expect("a folder");
        hub::save(&valid, &Map::new(), dir.path(), u64::MAX).unwrap();
        let again = ModelFolder::open(dir.path()).unwrap().load(&Device::default()).unwrap();
        assert_eq!(logits(&again, &ids(9)), logits(&valid, &ids(9)), "{name}");
        match valid.to_dense(&Device::default()) {
            Ok(dense) => {
                assert!(apart(&logits(&dense, &ids(9)), &logits(&valid, &ids(9))) < 1e-4, "{name}");
                assert_eq!(dense.config().parameterization, Parameterization::default());
            }
            Err(error) => assert!(entry.spec().exports.is_err(), "{name}: {error}"),
        }
    }
}

/// Tensors of a file by their names: type, shape, bytes.
fn tensors(path: &Path) -> BTreeMap<String, (safetensors::Dtype, Vec<usize>, Vec<u8>)> {
    let bytes = std::fs::read(path).expect("a file");
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let owned = |view: TensorView<'_>| (view.dtype(), view.shape().to_vec(), view.data().to_vec());
    file.tensors().into_iter().map(|(name, view)| (name, owned(view))).collect()
}

fn write(path: &Path, tensors: &BTreeMap<String, (safetensors::Dtype, Vec<usize>, Vec<u8>)>) {
    let view = |(kind, shape, bytes): &'_ (safetensors::Dtype, Vec<usize>, Vec<u8>)| {
        // Views of bytes that outlive the call.
        TensorView::new(*kind, shape.clone(), bytes.clone().leak()).expect("a tensor")
    };
    let views: Vec<(&String, TensorView)> = tensors.iter().map(|(name, tensor)| (name, view(tensor))).collect();
    safetensors::serialize_to_file(views, None, path).expect("a file that can be written");
}

#[test]
fn every_tensor_keeps_its_type_and_its_bits() {
    let config = config(Family::Qwen3);
    let dir = tempfile::tempdir().expect("a folder");
    hub::save(&model(&config, &Device::default()), &Map::new(), dir.path(), u64::MAX).unwrap();
    for kind in FileType::ALL {
        let rounded = tempfile::tempdir().expect("a folder");
        let open = |dir: &Path| ModelFolder::open(dir).unwrap();
        let whole = open(dir.path()).load(&Device::default()).unwrap();
        hub::save_as(&whole, &Map::new(), &FileTypes::all(kind), rounded.path(), u64::MAX).unwrap();
        // One tensor has another type than the rest, as norms in some folders.
        let file = rounded.path().join("model.safetensors");
        let mut mixed = tensors(&file);
        mixed.insert(
            "model.norm.weight".into(),
            tensors(&dir.path().join("model.safetensors"))["model.norm.weight"].clone(),
        );
        write(&file, &mixed);
        let folder = open(rounded.path());
        let types = folder.types().unwrap();
        assert_eq!((types.usual(), types.get("model.norm.weight")), (kind, FileType::F32));
        let again = tempfile::tempdir().expect("a folder");
        hub::save_as(&folder.load(&Device::default()).unwrap(), &Map::new(), &types, again.path(), u64::MAX).unwrap();
        assert!(tensors(&again.path().join("model.safetensors")) == mixed, "{kind:?}");
    }
    let far = RandomWeights { seed: 1, std: 1e5 };
    let far = Llama::build(&config, &mut { far }, &Device::default()).unwrap();
    let empty = tempfile::tempdir().expect("a folder");
    let refusal = hub::save_as(&far, &Map::new(), &FileTypes::all(FileType::F16), empty.path(), u64::MAX).unwrap_err();
    assert!(refusal.to_string().contains("f16") && refusal.to_string().contains("embed_tokens"), "{refusal}");
    assert_eq!(std::fs::read_dir(empty.path()).unwrap().count(), 0);
}

#[test]
fn training_goes_on_from_exact_weights_beside_rounded_ones() {
    let config = config(Family::Olmo2);
    let exact = model(&config, &Device::default());
    let dir = tempfile::tempdir().expect("a folder");
    hub::save_trained(&exact, &Map::new(), &FileTypes::all(FileType::BF16), dir.path(), u64::MAX).unwrap();
    let folder = ModelFolder::open(dir.path()).unwrap();
    assert_eq!(parameters(&folder.load_trained(MatrixStorage::Wide, &Device::default()).unwrap()), parameters(&exact));
    assert_ne!(parameters(&folder.load(&Device::default()).unwrap()), parameters(&exact));
    let plain = tempfile::tempdir().expect("a folder");
    hub::save_trained(&exact, &Map::new(), &FileTypes::default(), plain.path(), u64::MAX).unwrap();
    assert_eq!(std::fs::read_dir(plain.path()).unwrap().count(), 2, "nothing is written twice");
}

#[test]
fn damaged_folders_are_refused_by_tensor_or_key() {
    let config = config(Family::Qwen3);
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("model.safetensors");
    hub::save(&model(&config, &Device::default()), &Map::new(), dir.path(), u64::MAX).unwrap();
    let (whole, settings) = (tensors(&file), std::fs::read_to_string(dir.path().join("config.json")).unwrap());
    let refusal = || match ModelFolder::open(dir.path()).and_then(|folder| folder.load(&Device::default())) {
        Ok(_) => panic!("the folder was opened"),
        Err(error) => {
            assert!(error.is_input(), "{error}");
            error.to_string()
        }
    };
    for missing in ["model.layers.1.self_attn.q_norm.weight", "model.layers.0.self_attn.k_proj.bias", "lm_head.weight"]
    {
        let mut less = whole.clone();
        less.remove(missing);
        write(&file, &less);
        assert!(refusal().contains(missing) && refusal().contains("missing"), "{}", refusal());
    }
    let mut more = whole.clone();
    more.insert("model.layers.0.mlp.gate.weight".into(), whole["model.norm.weight"].clone());
    write(&file, &more);
    assert!(refusal().contains("mlp.gate.weight"), "{}", refusal());
    write(&file, &whole);
    for (key, value, part) in [
        ("vocab_size", json!(51), "embed_tokens"),
        ("use_sliding_window", json!(true), "sliding_window"),
        ("num_key_value_heads", json!(3), "num_key_value_heads"),
        ("model_type", json!("qwen4"), "qwen4"),
        ("rope_scaling", json!({"rope_type": "longrope"}), "longrope"),
        ("layer_types", json!(["full_attention"]), "layer_types"),
        ("layer_types", json!(["full_attention", "linear_attention"]), "linear_attention"),
        ("quantization_config", json!({"quant_method": "gptq"}), "gptq"),
    ] {
        let mut changed: Map<_, _> = serde_json::from_str(&settings).unwrap();
        changed.insert(key.into(), value.clone());
        if key == "use_sliding_window" {
            changed.insert("sliding_window".into(), json!(0));
        }
        std::fs::write(dir.path().join("config.json"), serde_json::to_vec(&changed).unwrap()).unwrap();
        assert!(refusal().contains(part), "{key} {value}: {}", refusal());
    }
}

#[test]
fn a_dynamic_base_allows_longer_sequences_than_the_model_was_made_for() {
    let config = LlamaConfig { rope_scaling: Some(RopeScaling::Dynamic { factor: 2.0 }), ..config(Family::Llama) };
    assert_eq!(config.longest_sequence(), 80);
    let model = model(&config, &Device::default());
    assert_eq!(generate(&model, &ids(9), 60, &Sampling::greedy(), |_| true).unwrap().len(), 60);
    let plain = LlamaConfig { rope_scaling: None, ..config };
    let same = self::model(&plain, &Device::default());
    assert_eq!(logits(&model, &ids(40)), logits(&same, &ids(40)));
    assert_ne!(logits(&model, &ids(41)), logits(&same, &ids(41)));
}

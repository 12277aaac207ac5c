//! Adapter folders with more than an adapter: modules that are trained whole, embeddings, rows, names of other trainers; and damaged ones.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};
use lowrank_models::adapter::{AdapterConfig, Attach, Targets, TrainedBiases, detach, merged};
use lowrank_models::hub::peft::{Form, PeftFolder, XLora, save};
use lowrank_models::{Llama, LlamaConfig, Sampling, ids_tensor};
use lowrank_optim::AdamWConfig;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

mod small_adapters;
use small_adapters::{all, apart, base, base_on, config, moved, open};

fn logits(model: &Llama) -> Vec<f32> {
    let ids: Vec<i32> = (0..22).map(|i| (i * i * 7 + 3) % 61).collect();
    model.valid().logits(ids_tensor(&ids, 2, &Device::default()), None).into_data().try_into_vec().expect("f32")
}

/// The small model on a device that tracks gradients.
fn tracked() -> Llama {
    base_on(&Device::default().autodiff())
}

fn lora(targets: &str) -> AdapterConfig {
    config("lora").with_targets(Targets::parse(targets))
}

/// Some steps of training; the parameters that have a gradient must be the expected number.
fn trained(mut model: Llama, gradients: usize) -> Llama {
    let mut optimizer = AdamWConfig::new().init();
    for step in 0..3 {
        let ids: Vec<i32> = (0..16).map(|i| (i * 5 + step) % 61).collect();
        let ids = || ids_tensor(&ids, 2, &Device::default());
        let grads = GradientsParams::from_grads(model.loss_sum(ids(), ids(), None).backward(), &model);
        assert_eq!(grads.len(), gradients);
        model = optimizer.step(1e-2, model, grads);
    }
    model
}

/// The model of a folder on the small base.
fn back(dir: &Path) -> Llama {
    open(dir).attach(base()).unwrap_or_else(|error| panic!("{error}")).0
}

fn refusal(dir: &Path) -> String {
    PeftFolder::open(dir).and_then(|folder| folder.attach(base())).map(|_| ()).expect_err("a refusal").to_string()
}

#[test]
fn modules_that_are_trained_whole_are_written_and_read_with_the_adapter() {
    let saved = AdapterConfig { modules_to_save: vec!["embed_tokens".into(), "lm_head".into()], ..lora("q_proj") };
    let (model, report) = tracked().attach(Attach::new(saved.clone())).unwrap();
    assert_eq!(report.whole, 2 * 61 * 32);
    assert!(report.to_string().contains("3904 values of the model"), "{report}");
    let model = trained(model, 2 * 2 + 2);
    for form in [Form::Own, Form::Peft] {
        let dir = tempfile::tempdir().expect("a folder");
        save(&model, "default", form, None, dir.path()).unwrap();
        let folder = open(dir.path());
        // By their whole paths: peft compares the ends of names.
        assert_eq!(folder.config.modules_to_save, ["lm_head", "model.embed_tokens"]);
        assert_eq!(folder.brings(), ["lm_head.weight", "model.embed_tokens.weight"]);
        assert_eq!(logits(&back(dir.path())), logits(&model));
        // They go on being trained.
        let (again, _) = open(dir.path()).attach(tracked()).unwrap();
        assert_ne!(logits(&trained(again, 6)), logits(&model));
    }
    // A structure of our own keeps them as well.
    let own = AdapterConfig { modules_to_save: vec!["lm_head".into()], ..config("wara") };
    let (model, _) = tracked().attach(Attach::new(own)).unwrap();
    let model = trained(model, 2 * 14 + 1);
    let dir = tempfile::tempdir().expect("a folder");
    save(&model, "default", Form::Own, None, dir.path()).unwrap();
    assert_eq!(logits(&back(dir.path())), logits(&model));

    for (names, reason) in [("no_module", "no module"), ("q_proj", "adapted as well")] {
        let config = AdapterConfig { modules_to_save: vec![names.into()], ..lora("q_proj") };
        let error = base().attach(Attach::new(config)).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("adapter.modules_to_save") && error.contains(reason), "{error}");
    }
}

#[test]
fn biases_are_trained_and_written_with_the_adapter() {
    // Four biases in each of two blocks; those of the adapted layers, or all.
    for (bias, count) in [(TrainedBiases::Adapted, 2), (TrainedBiases::All, 8)] {
        let (model, report) = tracked().attach(Attach::new(AdapterConfig { bias, ..lora("q_proj") })).unwrap();
        assert!(report.whole > 0, "{report}");
        let model = trained(model, 2 * 2 + count);
        for form in [Form::Own, Form::Peft] {
            let dir = tempfile::tempdir().expect("a folder");
            save(&model, "default", form, None, dir.path()).unwrap();
            assert_eq!(open(dir.path()).config.bias, bias);
            assert_eq!(open(dir.path()).brings().len(), count);
            assert_eq!(logits(&back(dir.path())), logits(&model));
        }
    }
    let none = AdapterConfig { bias: TrainedBiases::Adapted, ..lora("gate_proj") };
    let error = base().attach(Attach::new(none)).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("adapter.bias = adapted") && error.contains("no biases"), "{error}");
}

#[test]
fn an_embedding_is_adapted_row_by_row() {
    let (model, report) = tracked().attach(Attach::new(lora("embed_tokens,lm_head,v_proj"))).unwrap();
    assert_eq!(report.layers.len(), 4);
    assert_eq!(logits(&model), logits(&base()), "new adapters add nothing");
    let model = trained(model, 2 * 4);
    let dir = tempfile::tempdir().expect("a folder");
    save(&model, "default", Form::Peft, None, dir.path()).unwrap();
    assert_eq!(logits(&back(dir.path())), logits(&model));
    let together = merged(model.clone()).unwrap();
    assert!(apart(&logits(&together), &logits(&model)) < 1e-5);
    assert_eq!(logits(&detach(model, "default").unwrap()), logits(&base()));
    // Every name of all linear layers leaves the embedding alone.
    let (_, report) = base().attach(Attach::new(config("lora"))).unwrap();
    assert!(report.layers.iter().all(|layer| !layer.place.embedding));
    let error = base().attach(Attach::new(config("dora").with_targets(Targets::parse("embed_tokens"))));
    let error = error.map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("embed_tokens") && error.contains("use lora there"), "{error}");
}

#[test]
fn a_head_that_shares_the_table_is_left_alone_by_an_adapter_of_the_embedding() {
    let tied = LlamaConfig { tie_word_embeddings: true, ..base().config().clone() };
    let model = Llama::random(&tied, 5, &Device::default()).unwrap();
    let (_, report) = model.clone().attach(Attach::new(lora("embed_tokens"))).unwrap();
    assert!(report.warnings.iter().any(|warning| warning.contains("shares its table")), "{:?}", report.warnings);
    let model = moved(model, &lora("embed_tokens"));
    // The head of the base, on hidden states that start from the adapted rows.
    let ids = || ids_tensor(&[3, 1, 4, 1], 1, &Device::default());
    let hidden = model.hidden(ids(), None).reshape([4, 32]);
    let expected = hidden.matmul(model.model.embed_tokens.weight.base().transpose());
    let ours: Tensor<2> = model.logits(ids(), None).reshape([4, 61]);
    assert!((ours - expected).abs().max().into_scalar::<f32>() < 1e-5);
}

#[test]
fn peft_trains_one_of_two_that_share_a_table_as_a_copy_of_its_own() {
    let tied = LlamaConfig { tie_word_embeddings: true, ..base().config().clone() };
    let tied = || Llama::random(&tied, 5, &Device::default().autodiff()).unwrap();
    for saved in ["embed_tokens", "lm_head"] {
        let saved = AdapterConfig { modules_to_save: vec![saved.into()], ..lora("q_proj") };
        let (model, _) = tied().with_own_head().attach(Attach::new(saved)).unwrap();
        let model = trained(model, 5);
        let dir = tempfile::tempdir().expect("a folder");
        save(&model, "default", Form::Peft, None, dir.path()).unwrap();
        // As peft writes it, without the mark of this program.
        edit(dir.path(), |name, shape, data| Some((name.to_string(), shape, data)));
        let folder = || open(dir.path());
        assert!(folder().has_own_head());
        let refused = folder().attach(tied()).expect_err("one table for both").to_string();
        assert!(refused.contains("head apart from the embedding") && refused.contains("merge"), "{refused}");
        let (again, _) = folder().attach(tied().with_own_head()).unwrap();
        assert_eq!(logits(&again), logits(&model));
        assert_eq!(logits(&merged(again).unwrap()).len(), logits(&model).len());
        // One that keeps the tie is read into the tied model.
        set(dir.path(), "ensure_weight_tying", json!(true));
        assert!(!folder().has_own_head());
    }
}

#[test]
fn a_layer_of_a_whole_path_is_read_beside_those_of_the_blocks() {
    let (model, _) = base().attach(Attach::new(lora("layers.1.self_attn.q_proj,lm_head"))).unwrap();
    let dir = tempfile::tempdir().expect("a folder");
    save(&model, "default", Form::Peft, None, dir.path()).unwrap();
    edit(dir.path(), |name, shape, data| Some((name.to_string(), shape, data)));
    // peft asks for the block of a layer only where a name is the end of its path.
    set(dir.path(), "target_modules", json!(["q_proj", "lm_head"]));
    set(dir.path(), "layers_to_transform", json!([1]));
    let (_, report) = open(dir.path()).attach(base()).unwrap();
    let paths: Vec<&str> = report.layers.iter().map(|layer| layer.place.path.as_str()).collect();
    assert_eq!(paths, ["model.layers.1.self_attn.q_proj", "lm_head"]);
}

#[test]
fn an_embedding_starts_at_zero_whatever_the_other_layers_start_from() {
    let (model, _) =
        base().attach(Attach::new(AdapterConfig { init: "olora".into(), ..lora("embed_tokens,q_proj") })).unwrap();
    let table = model.model.embed_tokens.weight.base();
    assert_eq!(table.to_data(), base().model.embed_tokens.weight.val().to_data());
}

#[test]
fn tokens_that_were_added_come_with_their_embedding_and_head() {
    let saved = AdapterConfig { modules_to_save: vec!["embed_tokens".into(), "lm_head".into()], ..lora("q_proj") };
    let (model, _) = tracked().with_vocabulary(64).attach(Attach::new(saved)).unwrap();
    let model = trained(model, 6);
    let dir = tempfile::tempdir().expect("a folder");
    save(&model, "default", Form::Peft, None, dir.path()).unwrap();
    let (again, report) = open(dir.path()).attach(base()).unwrap();
    assert_eq!(again.config().vocab_size, 64);
    assert!(report.warnings.iter().any(|warning| warning.contains("3 tokens more")), "{:?}", report.warnings);
    assert_eq!(logits(&again), logits(&model));
    // A head of another size belongs to another model.
    edit(dir.path(), |name, shape, data| match name.ends_with("lm_head.weight") {
        true => Some((name.to_string(), vec![shape[0] - 1, shape[1]], data[..data.len() - 4 * shape[1]].to_vec())),
        false => Some((name.to_string(), shape, data)),
    });
    assert!(refusal(dir.path()).contains("vocabulary has the same size"));
    // Without any head the new tokens have none, and the one of the model is too small.
    edit(dir.path(), |name, shape, data| (!name.ends_with("lm_head.weight")).then(|| (name.to_string(), shape, data)));
    set(dir.path(), "modules_to_save", json!(["embed_tokens"]));
    assert!(refusal(dir.path()).contains("lm_head"), "{}", refusal(dir.path()));
}

#[test]
fn a_mixture_generates_token_by_token() {
    let mixture = XLora::open(golden("xlora").path(), golden_model()).unwrap();
    let prompt = [1, 5, 9];
    let written = mixture.generate(&prompt, 6, &Sampling::greedy(), |_| true).unwrap();
    let mut all = prompt.to_vec();
    for token in written {
        let logits = mixture.logits(ids_tensor(&all, 1, &Device::default()));
        let [_, positions, vocabulary] = logits.dims();
        let last = logits.slice([0..1, positions - 1..positions]).reshape([vocabulary]);
        assert_eq!(last.argmax(0).into_scalar::<i32>(), token);
        all.push(token);
    }
}

/// Tensors of a folder under other names.
fn edit(dir: &Path, change: impl Fn(&str, Vec<usize>, Vec<u8>) -> Option<(String, Vec<usize>, Vec<u8>)>) {
    let file = dir.join("adapter_model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    let read = SafeTensors::deserialize(&bytes).unwrap();
    let all = read.iter().map(|(name, view)| (name, view.dtype(), view.shape().to_vec(), view.data().to_vec()));
    let changed: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> = all
        .filter_map(|(name, dtype, shape, data)| {
            let (name, shape, data) = change(name, shape, data)?;
            Some((name, (dtype, shape, data)))
        })
        .collect();
    let views = changed.iter().map(|(name, (dtype, shape, data))| {
        (name, TensorView::new(*dtype, shape.clone(), data).expect("a shape of the data"))
    });
    safetensors::serialize_to_file(views, None, &file).unwrap();
}

fn set(dir: &Path, key: &str, value: Value) {
    let file = dir.join("adapter_config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    config[key] = value;
    std::fs::write(file, config.to_string()).unwrap();
}

fn written(config: &AdapterConfig) -> (tempfile::TempDir, Llama) {
    let dir = tempfile::tempdir().expect("a folder");
    let model = moved(base(), config);
    save(&model, "default", Form::Peft, None, dir.path()).unwrap();
    (dir, model)
}

#[test]
fn names_of_other_trainers_are_read() {
    for (from, to) in [
        ("base_model.model.", ""),
        ("base_model.model.", "module.base_model.model."),
        ("base_model.model.", "_orig_mod.base_model.model._fsdp_wrapped_module."),
        ("base_model.model.model.", "base_model.model."),
        (".self_attn.", "._checkpoint_wrapped_module.self_attn."),
        (".weight", ".some_name.weight"),
    ] {
        let (dir, model) = written(&lora("q_proj,down_proj"));
        edit(dir.path(), |name, shape, data| Some((name.replacen(from, to, 1), shape, data)));
        assert_eq!(logits(&back(dir.path())), logits(&model), "{from} as {to}");
    }
    // Two names of one tensor.
    let (dir, _) = written(&lora("q_proj"));
    edit(dir.path(), |name, shape, data| Some((name.replace("layers.1.", "layers.0."), shape, data)));
    assert!(refusal(dir.path()).contains("layers.1"), "the second layer has no tensors");
}

#[test]
fn settings_that_do_not_fit_are_refused_by_their_keys() {
    let refused = |config: &AdapterConfig, key: &str, value: Value, says: &[&str]| {
        let (dir, _) = written(config);
        set(dir.path(), key, value.clone());
        let error = refusal(dir.path());
        says.iter().for_each(|part| assert!(error.contains(part), "{key} = {value}: {part} is not in {error}"));
    };
    let plain = lora("q_proj");
    refused(&plain, "trainable_token_indices", json!([1, 2]), &["trainable_token_indices", "embed_tokens"]);
    refused(&plain, "trainable_token_indices", json!("all"), &["trainable_token_indices", "whole numbers"]);
    refused(&plain, "modules_to_save", json!(["lm_head"]), &["modules_to_save", "lm_head"]);
    refused(&plain, "bias", json!("many"), &["bias", "many"]);
    refused(&plain, "rank_pattern", json!([3]), &["rank_pattern"]);
    refused(&plain, "peft_type", json!("BOFT"), &["BOFT", "LOHA"]);
    refused(&plain, "peft_type", json!("XLORA"), &["XLORA", "experts"]);
    refused(&config("loha"), "r", json!(5), &["hada_w1_a", "[", "5"]);
    refused(&config("loha"), "alpha", json!(-1), &["alpha"]);
    refused(&config("lokr"), "decompose_factor", json!(0), &["decompose_factor = 0"]);
    refused(&config("lokr"), "decompose_factor", json!("four"), &["decompose_factor"]);
    refused(&config("lokr").with_rank(1), "decompose_both", json!(true), &["lokr_w1_a"]);
    refused(&config("oft"), "oft_block_size", json!(8), &["oft_R"]);
    refused(&config("oft"), "num_cayley_neumann_terms", json!(1u64 << 60), &["num_cayley_neumann_terms"]);
    refused(&config("ia3"), "feedforward_modules", json!(["q_proj"]), &["ia3_l", "q_proj"]);
    refused(&config("ia3"), "feedforward_modules", json!(3), &["feedforward_modules"]);
    refused(&config("hira"), "r", json!(1u64 << 40), &["hira_A"]);
    refused(&config("shira"), "r", json!(1), &["shira"]);
    refused(&config("fourierft"), "n_frequency", json!(1u64 << 40), &["coefficients"]);
    refused(&config("fourierft"), "n_frequency", json!(300), &["fourierft_spectrum"]);
    refused(&config("fourierft"), "scaling", json!(0), &["scaling = 0"]);
}

#[test]
fn ranks_by_layer_of_hira_are_ignored_as_peft_does() {
    let (dir, _) = written(&config("hira"));
    set(dir.path(), "rank_pattern", json!({"q_proj": 1}));
    let folder = PeftFolder::open(dir.path()).unwrap();
    assert!(folder.config.rank_pattern.is_empty() && folder.warnings.is_empty(), "{:?}", folder.warnings);
}

#[test]
fn damaged_tensors_are_refused_by_their_names() {
    let cut = |structure: &str, tensor: &'static str| {
        let (dir, _) = written(&config(structure));
        edit(dir.path(), |name, shape, data| (!name.ends_with(tensor)).then(|| (name.to_string(), shape, data)));
        let error = refusal(dir.path());
        // A layer of a single tensor has none left.
        let named = error.contains(tensor) || error.contains("q_proj.*");
        assert!(named && error.contains("missing"), "{structure}: {error}");
    };
    for (structure, tensor) in [
        ("loha", "hada_w2_b"),
        ("lokr", "lokr_w1"),
        ("oft", "oft_R.weight"),
        ("ia3", "ia3_l"),
        ("hira", "hira_B"),
        ("shira", "shira_indices"),
        ("fourierft", "fourierft_spectrum"),
    ] {
        cut(structure, tensor);
    }
    // Positions outside the weight.
    let (dir, _) = written(&config("shira"));
    edit(dir.path(), |name, shape, mut data| {
        if name.ends_with("shira_indices") {
            data[..4].copy_from_slice(&4096i32.to_le_bytes());
        }
        Some((name.to_string(), shape, data))
    });
    let error = refusal(dir.path());
    assert!(error.contains("shira_indices") && error.contains("4096"), "{error}");
}

/// Adapter folders of the golden cases.
fn golden(name: &str) -> tempfile::TempDir {
    fn copy(from: &Path, to: &Path) {
        std::fs::create_dir_all(to).unwrap();
        for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
            let target = to.join(entry.file_name());
            if entry.path().is_dir() { copy(&entry.path(), &target) } else { drop(std::fs::copy(entry.path(), target)) }
        }
    }
    let dir = tempfile::tempdir().expect("a folder");
    copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/interop-peft-more").join(name), dir.path());
    dir
}

fn golden_model() -> Llama {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/interop-peft-more/model");
    lowrank_models::hub::ModelFolder::open(&dir).unwrap().load(&Device::default()).unwrap()
}

#[test]
fn folders_of_peft_that_contradict_themselves_are_refused() {
    let refused = |dir: &Path| {
        let opened = PeftFolder::open(dir).and_then(|folder| folder.attach(golden_model()));
        opened.map(|_| ()).expect_err("a refusal").to_string()
    };
    let dir = golden("adalora");
    set(dir.path(), "rank_pattern", json!({"model.layers.0.mlp.down_proj.lora_E": [true, true, false]}));
    let error = refused(dir.path());
    assert!(error.contains("down_proj has 1 rows") && error.contains("keeps 2"), "{error}");
    let dir = golden("adalora");
    edit(dir.path(), |name, shape, data| (!name.ends_with("1.mlp.up_proj.lora_E")).then(|| (name.into(), shape, data)));
    assert!(refused(dir.path()).contains("lora_E"), "values are missing");
    let dir = golden("lora_trainable_tokens");
    set(dir.path(), "trainable_token_indices", json!([3, 7, 40]));
    assert!(refused(dir.path()).contains("row 40"));
    set(dir.path(), "trainable_token_indices", json!([3, 7]));
    assert!(refused(dir.path()).contains("[3, 16]"));
    let dir = golden("lora_embedding");
    edit(dir.path(), |name, shape, mut data| {
        if name.ends_with("base_layer.weight") {
            data[0] ^= 1;
        }
        Some((name.to_string(), shape, data))
    });
    assert!(refused(dir.path()).contains("copy of another base weight"));
    let mixture = |dir: &Path| XLora::open(dir, golden_model()).map(|_| ()).expect_err("a refusal").to_string();
    let dir = golden("xlora");
    set(dir.path(), "adapters", json!({"0": "expert_0"}));
    let error = mixture(dir.path());
    assert!(error.contains("12 weights") && error.contains("ask for 6"), "{error}");
    set(dir.path(), "adapters", json!({}));
    assert!(mixture(dir.path()).contains("0 experts"));
    set(dir.path(), "adapters", json!({"0": "expert_0", "1": "nowhere"}));
    assert!(mixture(dir.path()).contains("nowhere"));
}

#[test]
fn every_structure_says_how_it_goes_to_peft() {
    for config in all() {
        let dir = tempfile::tempdir().expect("a folder");
        let model = moved(base(), &config);
        match save(&model, "default", Form::Peft, None, dir.path()) {
            Ok(()) => {
                let text = std::fs::read_to_string(dir.path().join("adapter_config.json")).unwrap();
                assert!(!text.contains("\"lowrank\""), "{}: keys that peft does not know", config.structure);
            }
            Err(error) => assert!(error.to_string().contains("peft has no"), "{error}"),
        }
    }
}

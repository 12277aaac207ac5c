//! Adapter folders in another form: nothing that belongs to them gets lost, and `peft` reads every part as it was meant.

#[path = "program.rs"]
mod program;

use std::collections::BTreeSet;
use std::path::Path;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, Tensor};
use lowrank_models::adapter::{AdapterConfig, Attach, Targets, TrainedBiases, merged};
use lowrank_models::hub::peft::{Form, PeftFolder, save};
use lowrank_models::hub::{ModelFolder, TensorFiles, save as save_model};
use lowrank_models::{Llama, LlamaConfig, ids_tensor};
use program::{Workshop, refused, succeeded};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// A small model in `model`.
fn base(shop: &Workshop, tied: bool) -> Llama {
    let config = LlamaConfig {
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        tie_word_embeddings: tied,
        ..LlamaConfig::named("llama-9m", 61).expect("a known shape")
    };
    let base = Llama::random(&config, 5, &Device::default()).expect("a model");
    std::fs::create_dir(shop.path("model")).expect("a new folder");
    save_model(&base, &Default::default(), &shop.path("model"), u64::MAX).expect("a model folder");
    base
}

/// The base with an adapter; everything that is trained has moved.
fn moved(base: &Llama, config: AdapterConfig) -> Llama {
    struct Move(f32);
    impl ModuleMapper for Move {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            if !param.is_require_grad() {
                return param;
            }
            self.0 += 0.01;
            param.map(|tensor| tensor + self.0)
        }
    }
    let (model, _) = base.clone().attach(Attach::new(config)).expect("it fits");
    model.map(&mut Move(0.0))
}

fn output(model: &Llama) -> Vec<f32> {
    let ids: Vec<i32> = (0..12).map(|place| place * 5 % 61).collect();
    model.logits(ids_tensor(&ids, 1, &Device::default()), None).into_data().try_into_vec().expect("f32")
}

fn apart(x: &[f32], y: &[f32]) -> f32 {
    assert_eq!(x.len(), y.len());
    x.iter().zip(y).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

fn attached(base: &Llama, dir: &Path) -> Llama {
    PeftFolder::open(dir).and_then(|folder| folder.attach(base.clone())).unwrap_or_else(|error| panic!("{error}")).0
}

fn names(dir: &Path) -> BTreeSet<String> {
    let (files, _) = TensorFiles::of_file(&dir.join("adapter_model.safetensors")).expect("tensors");
    files.shapes().map(|(name, _)| name.trim_start_matches("base_model.model.").to_string()).collect()
}

fn config_of(dir: &Path) -> Value {
    let text = std::fs::read(dir.join("adapter_config.json")).expect("a configuration");
    serde_json::from_slice(&text).expect("JSON")
}

fn lora(targets: &str) -> AdapterConfig {
    AdapterConfig::new("lora").with_rank(4).with_targets(Targets::parse(targets))
}

#[test]
fn modules_biases_and_rows_survive_a_conversion() {
    let shop = Workshop::new(0);
    let base = base(&shop, false);
    let whole = AdapterConfig { modules_to_save: vec!["norm".into(), "lm_head".into()], ..lora("q_proj,v_proj") };
    let rows = AdapterConfig { token_rows: vec![("embed_tokens".into(), vec![3, 7])], ..lora("q_proj") };
    for (name, config, tensor) in [
        ("whole", AdapterConfig { structure: "dora".into(), ..whole.clone() }, "model.norm.weight"),
        ("plain", whole, "lm_head.weight"),
        ("rows", rows, "model.embed_tokens.token_adapter.trainable_tokens_delta"),
    ] {
        let moved = moved(&base, config);
        save(&moved, "default", Form::Own, Some("model"), &shop.path(name)).expect("a folder");
        let converted = format!("{name}-lora");
        let words = ["export", "--adapter", name, "--model", "model", "--as", "lora", "--rank", "32", "--out"];
        succeeded(shop.run(&[&words[..], &[&converted]].concat()));
        assert!(names(&shop.path(&converted)).contains(tensor), "{name}: {:?}", names(&shop.path(&converted)));
        let back = attached(&base, &shop.path(&converted));
        assert!(apart(&output(&back), &output(&moved)) < 1e-3, "{name}");
        let words = ["export", "--adapter", name, "--model", "model", "--as", "shira", "--out", "sparse"];
        refused(&shop.run(&words), &["--as shira", "besides its adapter", "--as lora"]);
        assert!(!shop.path("sparse").exists());
    }
}

#[test]
fn modules_are_named_by_their_whole_paths() {
    let shop = Workshop::new(0);
    let base = base(&shop, false);
    let config = AdapterConfig { modules_to_save: vec!["norm".into()], ..lora("q_proj") };
    let moved = moved(&base, config);
    for form in [Form::Own, Form::Peft] {
        let dir = shop.path("out");
        save(&moved, "default", form, None, &dir).expect("a folder");
        // The end "norm" is that of input_layernorm too.
        assert_eq!(config_of(&dir)["modules_to_save"], serde_json::json!(["model.norm"]));
        assert_eq!(output(&attached(&base, &dir)), output(&moved));
        std::fs::remove_dir_all(dir).expect("a folder");
    }
}

#[test]
fn a_table_that_serves_as_head_stays_one() {
    let shop = Workshop::new(0);
    let base = base(&shop, true);
    let config = AdapterConfig { modules_to_save: vec!["embed_tokens".into()], ..lora("q_proj") };
    let moved = moved(&base, config);
    save(&moved, "default", Form::Peft, None, &shop.path("out")).expect("a folder");
    // What peft asks for.
    assert_eq!(config_of(&shop.path("out"))["ensure_weight_tying"], true);
    assert!(names(&shop.path("out")).contains("lm_head.weight"));
    let folder = PeftFolder::open(&shop.path("out")).expect("a folder");
    assert!(!folder.has_own_head());
    assert_eq!(output(&attached(&base, &shop.path("out"))), output(&moved));
    let words = ["export", "--adapter", "out", "--model", "model", "--as", "lora", "--rank", "4", "--out", "again"];
    succeeded(shop.run(&words));
    assert_eq!(config_of(&shop.path("again"))["ensure_weight_tying"], true);
    assert!(apart(&output(&attached(&base, &shop.path("again"))), &output(&moved)) < 1e-4);
}

#[test]
fn embeddings_keep_the_names_that_peft_reads() {
    let shop = Workshop::new(0);
    let base = base(&shop, false);
    let targets = "embed_tokens,q_proj";
    let models = ["one", "two"].map(|name| {
        let config = AdapterConfig { seed: name.len() as u64, ..lora(targets) };
        let moved = moved(&base, config);
        save(&moved, "default", Form::Peft, None, &shop.path(name)).expect("a folder");
        moved
    });
    let is_embedding = |dir: &str| {
        let names = names(&shop.path(dir));
        let has = |letter: &str| names.contains(&format!("model.embed_tokens.lora_embedding_{letter}"));
        assert!(has("A") && has("B") && !names.iter().any(|name| name.contains("embed_tokens.lora_A")), "{names:?}");
    };
    is_embedding("one");
    succeeded(shop.run(&["compose", "--method", "cat", "--adapter", "one", "--adapter", "two=0", "--out", "sum"]));
    is_embedding("sum");
    assert!(apart(&output(&attached(&base, &shop.path("sum"))), &output(&models[0])) < 1e-4);
    let words = ["compose", "--method", "rmm", "--adapter", "one", "--adapter", "two", "--set", "p=1", "--out", "pool"];
    succeeded(shop.run(&words));
    succeeded(shop.run(&["revert", "--pool", "pool", "--name", "two", "--out", "two-again"]));
    is_embedding("two-again");
    assert!(apart(&output(&attached(&base, &shop.path("two-again"))), &output(&models[1])) < 1e-3);
    for (model, out) in [(None, "alone"), (Some("model"), "with")] {
        let model = model.map_or(vec![], |model| vec!["--model", model]);
        let words = ["export", "--adapter", "one", "--as", "lora", "--rank", "4", "--out", out];
        succeeded(shop.run(&[&words[..], &model].concat()));
        is_embedding(out);
        assert!(apart(&output(&attached(&base, &shop.path(out))), &output(&models[0])) < 1e-3, "{out}");
    }
    // In the weights a table lies the other way round than those of linear layers.
    let words = ["compose", "--method", "cat", "--adapter", "one", "--adapter", "two=0", "--model", "model"];
    succeeded(shop.run(&[&words[..], &["--out", "merged"]].concat()));
    let model = ModelFolder::open(&shop.path("merged")).and_then(|folder| folder.load(&Device::default()));
    let whole = merged(models[0].clone()).expect("LoRA merges");
    assert!(apart(&output(&model.expect("a model")), &output(&whole)) < 1e-4);
}

#[test]
fn forms_of_our_own_are_no_type_of_peft() {
    let shop = Workshop::new(0);
    let base = base(&shop, false);
    let scaled = AdapterConfig::new("randlora").with_rank(4).with_option("sqrt_n_scaling", true);
    for config in [scaled, AdapterConfig::new("allora").with_rank(4), AdapterConfig::new("wara").with_rank(4)] {
        let (dir, structure) = (shop.path(&config.structure), config.structure.clone());
        let moved = moved(&base, config);
        save(&moved, "default", Form::Own, None, &dir).expect("a folder");
        let kind = config_of(&dir)["peft_type"].as_str().expect("a type").to_string();
        assert_eq!(kind, format!("LOWRANK_{}", structure.to_uppercase()));
        assert_eq!(output(&attached(&base, &dir)), output(&moved));
    }
}

#[test]
fn copies_of_base_weights_are_no_trained_weights() {
    let shop = Workshop::new(0);
    let base = base(&shop, false);
    let moved = moved(&base, lora("q_proj"));
    save(&moved, "default", Form::Peft, None, &shop.path("one")).expect("a folder");
    let path = shop.path("one/adapter_model.safetensors");
    let bytes = std::fs::read(&path).expect("tensors");
    let tensors = SafeTensors::deserialize(&bytes).expect("tensors");
    let (mut model, _) = TensorFiles::of_file(&shop.path("model/model.safetensors")).expect("weights");
    let weight = "model.layers.0.self_attn.q_proj.weight";
    let values = model.take(weight, &[32, 32]).expect("a weight");
    let values: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut all = tensors.tensors();
    let copy = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight".to_string();
    all.push((copy, TensorView::new(Dtype::F32, vec![32, 32], &values).expect("a tensor")));
    safetensors::serialize_to_file(all, None, &path).expect("a file");
    succeeded(shop.run(&["compose", "--method", "cat", "--adapter", "one", "--out", "same"]));
    assert!(apart(&output(&attached(&base, &shop.path("same"))), &output(&moved)) < 1e-4);
    let words = ["export", "--adapter", "one", "--model", "model", "--as", "lora", "--rank", "4", "--out", "lora"];
    succeeded(shop.run(&words));
    assert!(!names(&shop.path("lora")).iter().any(|name| name.contains("base_layer")));
}

#[test]
fn biases_survive_a_conversion() {
    let shop = Workshop::new(0);
    let config = LlamaConfig::named("llama-9m", 61).expect("a known shape");
    let features = lowrank_models::Features { qkv_bias: true, output_bias: true, ..config.features };
    let config = LlamaConfig {
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 1,
        num_attention_heads: 4,
        num_key_value_heads: 4,
        head_dim: 8,
        features,
        ..config
    };
    let base = Llama::random(&config, 5, &Device::default()).expect("a model");
    std::fs::create_dir(shop.path("model")).expect("a new folder");
    save_model(&base, &Default::default(), &shop.path("model"), u64::MAX).expect("a model folder");
    let moved = moved(&base, AdapterConfig { bias: TrainedBiases::All, ..lora("q_proj") });
    save(&moved, "default", Form::Own, None, &shop.path("biases")).expect("a folder");
    let words = ["export", "--adapter", "biases", "--model", "model", "--as", "lora", "--rank", "4", "--out", "lora"];
    succeeded(shop.run(&words));
    assert_eq!(config_of(&shop.path("lora"))["bias"], "all");
    assert!(apart(&output(&attached(&base, &shop.path("lora"))), &output(&moved)) < 1e-4);
}

#[test]
fn scaled_outputs_and_inputs_become_plain_lora_where_no_bias_is_scaled() {
    let shop = Workshop::new(0);
    let base = base(&shop, false);
    let moved = moved(&base, AdapterConfig::new("ia3").with_targets(Targets::parse("k_proj,down_proj")));
    save(&moved, "default", Form::Own, None, &shop.path("ia3")).expect("a folder");
    let words = ["export", "--adapter", "ia3", "--model", "model", "--as", "lora", "--rank", "32", "--out", "lora"];
    succeeded(shop.run(&words));
    assert!(apart(&output(&attached(&base, &shop.path("lora"))), &output(&moved)) < 1e-4);
}

#[test]
fn components_with_values_become_an_adalora_folder() {
    let shop = Workshop::new(0);
    let base = base(&shop, false);
    let moved = moved(&base, AdapterConfig::new("triplet").with_rank(5).with_alpha(7.0));
    save(&moved, "default", Form::Own, None, &shop.path("triplet")).expect("a folder");
    succeeded(shop.run(&["export", "--adapter", "triplet", "--model", "model", "--as", "adalora", "--out", "adalora"]));
    let config = config_of(&shop.path("adalora"));
    assert_eq!((config["peft_type"].as_str(), config["init_r"].as_u64()), (Some("ADALORA"), Some(5)));
    assert!(apart(&output(&attached(&base, &shop.path("adalora"))), &output(&moved)) < 1e-4);
    save(&self::moved(&base, lora("q_proj")), "default", Form::Own, None, &shop.path("plain")).expect("a folder");
    let words = ["export", "--adapter", "plain", "--model", "model", "--as", "adalora", "--out", "none"];
    refused(&shop.run(&words), &["lora has no values between its factors", "--as lora"]);
    assert!(!shop.path("none").exists());
}

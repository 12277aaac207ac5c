//! Types and families of model files, through the program.

#[path = "program.rs"]
mod program;

use std::collections::BTreeMap;
use std::path::Path;

use program::{Workshop, checkpoints, refused, stderr, succeeded};
use safetensors::{Dtype, SafeTensors};

/// Types and bytes of the weights of a folder, by name.
fn weights(dir: &Path) -> BTreeMap<String, (Dtype, Vec<u8>)> {
    let bytes = std::fs::read(dir.join("model.safetensors")).expect("weights");
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    file.tensors().into_iter().map(|(name, view)| (name, (view.dtype(), view.data().to_vec()))).collect()
}

fn dtype(dir: &Path) -> String {
    let text = std::fs::read_to_string(dir.join("config.json")).expect("a configuration");
    let config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    config["dtype"].as_str().expect("a type").to_string()
}

/// Examples made of the words that the tokenizers of the golden folders have.
fn examples(shop: &Workshop) {
    let line = |i: usize| format!("{{\"prompt\": \"w{} w{} \", \"completion\": \"w{}\"}}", 3 + i, 5 + i, 4 + i);
    std::fs::write(shop.path("examples.jsonl"), (0..20).map(line).collect::<Vec<_>>().join("\n")).expect("a file");
}

fn golden(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/interop-families").join(name);
    folder.to_str().expect("a path of text").to_string()
}

fn same(a: &Path, b: &Path) -> bool {
    std::fs::read(a).expect("a file") == std::fs::read(b).expect("a file")
}

#[test]
fn merged_and_exported_weights_have_the_type_of_the_base() {
    let shop = Workshop::new(1);
    examples(&shop);
    succeeded(shop.run(&["export", "--model", &golden("qwen3"), "--dtype", "bf16", "--out", "model"]));
    let base = weights(&shop.path("model"));
    assert!(base.values().all(|(kind, _)| *kind == Dtype::BF16));
    succeeded(shop.run(&["export", "--model", "model", "--out", "again"]));
    assert!(weights(&shop.path("again")) == base, "a round trip keeps all bits");
    assert!(same(&shop.path("again/config.json"), &shop.path("model/config.json")));

    succeeded(shop.run(&shop.tuned("run", &["--rank", "2", "--steps", "4", "--set", "adapter.targets=q_proj"])));
    let adapter = checkpoints(&shop.path("run")).pop().expect("a checkpoint");
    let merge = |more: &[&str]| {
        shop.run(&[&["merge", "--model", "model", "--adapter", adapter.to_str().expect("text")], more].concat())
    };
    succeeded(merge(&["--out", "merged"]));
    let merged = weights(&shop.path("merged"));
    assert!(merged.values().all(|(kind, _)| *kind == Dtype::BF16) && dtype(&shop.path("merged")) == "bfloat16");
    for (name, weight) in &merged {
        assert_eq!(*weight == base[name], !name.contains("q_proj"), "{name}");
    }
    succeeded(merge(&["--dtype", "f32", "--out", "wide"]));
    assert!(weights(&shop.path("wide")).values().all(|(kind, _)| *kind == Dtype::F32));
    assert_eq!(dtype(&shop.path("wide")), "float32");
    refused(&merge(&["--dtype", "int8", "--out", "narrow"]), &["--dtype int8", "bf16"]);
    assert!(!shop.path("narrow").exists());
}

#[test]
fn a_whole_fine_tuning_writes_the_type_of_the_base_and_resumes_from_exact_weights() {
    let shop = Workshop::new(1);
    examples(&shop);
    succeeded(shop.run(&["export", "--model", &golden("olmo2"), "--dtype", "f16", "--out", "model"]));
    let more = ["--adapter", "none", "--steps", "6", "--set", "checkpoint.every=3"];
    succeeded(shop.run(&shop.tuned("run", &more)));
    let last = checkpoints(&shop.path("run")).pop().expect("a checkpoint");
    let whole = weights(&last);
    assert!(whole.values().all(|(kind, _)| *kind == Dtype::F16) && dtype(&last) == "float16");
    let exact = last.join("weights-f32.safetensors");
    let before = std::fs::read(&exact).expect("the exact weights");
    succeeded(shop.run(&["generate", "--model", last.to_str().expect("text"), "--prompt", "w3", "--tokens", "4"]));
    succeeded(shop.run(&shop.tuned("run", &[&more[..], &["--resume-from", "step-000003"]].concat())));
    assert!(std::fs::read(&exact).expect("the exact weights") == before, "other bits after a resumption");
    assert!(weights(&last) == whole);

    let wide = [&more[..], &["--set", "checkpoint.dtype=f32"]].concat();
    succeeded(shop.run(&shop.tuned("wide", &wide)));
    let last = checkpoints(&shop.path("wide")).pop().expect("a checkpoint");
    assert!(weights(&last).values().all(|(kind, _)| *kind == Dtype::F32));
    assert!(!last.join("weights-f32.safetensors").exists());
}

#[test]
fn a_gguf_file_is_tuned_resumed_merged_and_composed_like_a_folder() {
    let shop = Workshop::new(1);
    examples(&shop);
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/gguf/llama_q8_0.gguf");
    std::fs::copy(file, shop.path("model")).expect("a GGUF file");
    let more = ["--rank", "2", "--set", "train.seq_len=32", "--steps", "4", "--set", "checkpoint.every=2"];
    succeeded(shop.run(&shop.tuned("run", &more)));
    let adapter = checkpoints(&shop.path("run")).pop().expect("a checkpoint");
    let tensors = adapter.join("adapter_model.safetensors");
    let before = std::fs::read(&tensors).expect("tensors");
    let again = [&more[..], &["--resume-from", "step-000002"]].concat();
    succeeded(shop.run(&shop.tuned("run", &again)));
    assert!(std::fs::read(&tensors).expect("tensors") == before, "other bits after a resumption");
    // Other content under the same name is another model.
    std::fs::rename(shop.path("model"), shop.path("own")).expect("a file");
    let mut bytes = std::fs::read(shop.path("own")).expect("a file");
    *bytes.last_mut().expect("weights") ^= 1;
    std::fs::write(shop.path("model"), bytes).expect("a file");
    refused(&shop.run(&shop.tuned("run", &again)), &["model"]);
    std::fs::rename(shop.path("own"), shop.path("model")).expect("a file");

    let adapter = adapter.to_str().expect("text");
    succeeded(shop.run(&["merge", "--model", "model", "--adapter", adapter, "--out", "merged"]));
    let say = |more: &[&str]| {
        let args = [&["generate", "--greedy", "--tokens", "8", "--prompt", "w3 w4"], more].concat();
        succeeded(shop.run(&args)).stdout
    };
    assert_eq!(say(&["--model", "merged"]), say(&["--model", "model", "--adapter", adapter]));

    std::fs::create_dir(shop.path("copy")).expect("a folder");
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(Path::new(adapter).join(name), shop.path("copy").join(name)).expect("a file");
    }
    let words = ["compose", "--method", "cat", "--adapter", adapter, "--adapter", "copy=-1", "--out", "sum", "--model"];
    refused(&shop.run(&[&words[..], &["model"]].concat()), &["model: is a file", "lowrank export --model model"]);
    assert!(!shop.path("sum").exists());
    succeeded(shop.run(&["export", "--model", "model", "--out", "folder"]));
    succeeded(shop.run(&[&words[..], &["folder"]].concat()));
    assert!(weights(&shop.path("sum")) == weights(&shop.path("folder")), "an adapter less itself changes nothing");
}

#[test]
fn every_family_is_tuned_merged_and_generates() {
    for name in ["biases", "mistral_window", "qwen2", "qwen3", "smollm3", "olmo2", "granite"] {
        let shop = Workshop::new(1);
        examples(&shop);
        succeeded(shop.run(&["export", "--model", &golden(name), "--out", "model"]));
        let model = "model".to_string();
        let losses = ["whole", "checkpointed"].map(|mode| {
            let out = ["--rank", "2", "--steps", "3", "--backward", mode];
            succeeded(shop.run(&shop.tuned(mode, &out)));
            let metrics = program::metrics(&shop.path(mode));
            metrics.iter().filter_map(|line| line["loss"].as_f64()).collect::<Vec<_>>()
        });
        assert_eq!(losses[0].len(), losses[1].len());
        let apart = losses[0].iter().zip(&losses[1]).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(!losses[0].is_empty() && apart < 1e-5, "{name}: {losses:?}");
        let adapter = checkpoints(&shop.path("whole")).pop().expect("a checkpoint");
        let adapter = adapter.to_str().expect("text");
        succeeded(shop.run(&["merge", "--model", &model, "--adapter", adapter, "--out", "merged"]));
        let say = |more: &[&str]| {
            let args = [&["generate", "--greedy", "--tokens", "8", "--prompt", "w3 w4"], more].concat();
            succeeded(shop.run(&args)).stdout
        };
        assert_eq!(say(&["--model", "merged"]), say(&["--model", &model, "--adapter", adapter]), "{name}");
    }
}

#[test]
fn settings_of_generation_are_followed_where_tokens_are_drawn() {
    let shop = Workshop::new(1);
    succeeded(shop.run(&["export", "--model", &golden("qwen2"), "--out", "model"]));
    let say = |more: &[&str]| {
        let args = [&["generate", "--model", "model", "--prompt", "w3 w4", "--tokens", "12"], more].concat();
        String::from_utf8(succeeded(shop.run(&args)).stdout).expect("text")
    };
    let settings = |text: &str| std::fs::write(shop.path("model/generation_config.json"), text).expect("a file");
    settings("{}");
    let drawn = ["1", "2", "3", "4"].map(|seed| say(&["--seed", seed, "--temperature", "9"]));
    assert!(drawn.iter().any(|text| *text != drawn[0]), "{drawn:?}");
    let greedy = say(&["--greedy"]);
    settings(r#"{"do_sample": true, "temperature": 9.0, "top_k": 1}"#);
    for seed in ["1", "2", "3", "4"] {
        assert_eq!(say(&["--seed", seed]), greedy, "one token is left to draw from");
    }
    settings(r#"{"temperature": 0.5, "top_k": 1, "repetition_penalty": 1e6, "min_p": 0.1}"#);
    assert_eq!(say(&["--greedy"]), greedy);
    let strict = say(&[]);
    let words: Vec<&str> = strict.split_whitespace().collect();
    let mut unique = words.clone();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len(), words.len(), "{strict}");
    let output = shop.run(&["generate", "--model", "model", "--prompt", "w3", "--tokens", "1"]);
    assert!(stderr(&output).contains("min_p"), "{}", stderr(&output));
    settings(r#"{"top_p": 7}"#);
    let bad = shop.run(&["generate", "--model", "model", "--prompt", "w3"]);
    refused(&bad, &["generation_config.json", "top_p is 7"]);
}

#[test]
fn folders_that_cannot_be_read_are_refused_and_leave_nothing() {
    let folders = std::fs::read_dir(golden("")).expect("folders");
    let names: Vec<String> =
        folders.map(|entry| entry.expect("a folder").file_name().to_string_lossy().into()).collect();
    let refusals: Vec<&String> =
        names.iter().filter(|name| name.starts_with("refuse_") && !name.ends_with("safetensors")).collect();
    assert!(refusals.len() > 5, "{names:?}");
    let shop = Workshop::new(1);
    for name in refusals {
        refused(&shop.run(&["export", "--model", &golden(name), "--out", "out"]), &["config.json"]);
        assert!(!shop.path("out").exists(), "{name}");
    }
}

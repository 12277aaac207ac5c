//! Python on the other side: `transformers` opens our models, TensorBoard reads our events.
//!
//! Needs `LOWRANK_PYTHON`, an interpreter with the packages of `requirements.txt`; `.ci/run` makes one and runs these tests, which are ignored
//! elsewhere. Asked for without it they fail.

#[path = "exchanged_adapters.rs"]
mod exchanged_adapters;
#[path = "program.rs"]
mod program;
#[path = "small_families.rs"]
mod small_families;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use exchanged_adapters::{adapted, exchanged};
use lowrank_models::adapter::{AdapterConfig, merged};
use lowrank_models::hub::{ModelFolder, peft, save};
use lowrank_models::{Family, Llama, LlamaConfig, Sampling, generate, ids_tensor};
use lowrank_train::data::Tokenizer;
use lowrank_train::data::images::Picture;
use program::{Workshop, checkpoints, succeeded};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

/// Runs a Python script beside this file.
fn python(script: &str, args: &[&str]) {
    let Some(python) = std::env::var_os("LOWRANK_PYTHON") else {
        panic!("set LOWRANK_PYTHON to an interpreter with the packages of tests/requirements.txt");
    };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests").join(script);
    let output =
        Command::new(python).arg(path).args(args).env("CUDA_VISIBLE_DEVICES", "").output().expect("Python starts");
    let message = succeeded(output);
    println!("{script}: {}", String::from_utf8_lossy(&message.stdout).trim());
}

fn values(tensor: Tensor<3>) -> Vec<f32> {
    tensor.into_data().try_into_vec().expect("f32")
}

/// Writes ids, logits and the ids of a text beside a model, for Python to compare with.
fn write_expected(dir: &Path, model: &Llama, tokenizer: Option<&Tokenizer>) {
    let ids: Vec<i32> = (0..2 * 13).map(|i| (i * i * 7 + 3) % model.config().vocab_size as i32).collect();
    let logits = model.valid().logits(ids_tensor(&ids, 2, &Device::default()), None);
    let (shape, logits) = (logits.dims().to_vec(), values(logits));
    let bytes = |ids: &[i64]| ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>();
    let wide = bytes(&ids.iter().map(|id| i64::from(*id)).collect::<Vec<_>>());
    let floats: Vec<u8> = logits.iter().flat_map(|value| value.to_le_bytes()).collect();
    let text = "fn größe() -> usize {\n    // the model learns 日本語 🦀\n}\n";
    let text_ids: Vec<i64> =
        tokenizer.map_or(Vec::new(), |t| t.encode_whole(text).unwrap().iter().map(|id| i64::from(*id)).collect());
    let text_bytes = bytes(&text_ids);
    std::fs::write(dir.join("text.txt"), text).unwrap();
    let tensors = [
        ("ids", TensorView::new(Dtype::I64, vec![2, 13], &wide).unwrap()),
        ("logits", TensorView::new(Dtype::F32, shape, &floats).unwrap()),
        ("text_ids", TensorView::new(Dtype::I64, vec![text_ids.len()], &text_bytes).unwrap()),
    ];
    safetensors::serialize_to_file(tensors, None, &dir.join("expected.safetensors")).unwrap();
}

#[test]
#[ignore = "needs LOWRANK_PYTHON"]
fn transformers_opens_a_pretrained_checkpoint() {
    let shop = Workshop::new(30);
    for (out, tokenizer) in [("bytes", "bytes"), ("trained", "")] {
        let setting = format!("tokenizer.path={tokenizer}");
        let more = [
            "--steps",
            "5",
            "--set",
            &setting,
            "--set",
            "tokenizer.vocab_size=300",
            "--set",
            "model.num_key_value_heads=1",
        ];
        succeeded(shop.run(&shop.tiny(out, &more)));
        let dir = checkpoints(&shop.path(out)).pop().unwrap();
        let model = ModelFolder::open(&dir).unwrap().load(&Device::default()).unwrap();
        write_expected(&dir, &model, Some(&Tokenizer::from_file(&dir.join("tokenizer.json")).unwrap()));
        python("interop_model.py", &["check", dir.to_str().unwrap()]);
    }
}

/// The logits are those of the sparse plus low-rank model; Python multiplies with the dense weights.
#[test]
#[ignore = "needs LOWRANK_PYTHON"]
fn transformers_opens_an_exported_sltrain_model() {
    let shop = Workshop::new(30);
    let more = [
        "--steps",
        "20",
        "--parameterization",
        "sltrain",
        "--set",
        "model.parameterization.options.rank=6",
        "--lr",
        "0.01",
    ];
    succeeded(shop.run(&shop.tiny("sparse", &more)));
    let checkpoint = checkpoints(&shop.path("sparse")).pop().unwrap();
    succeeded(shop.run(&["export", "--model", checkpoint.to_str().unwrap(), "--out", "dense"]));
    let model = ModelFolder::open(&checkpoint).unwrap().load(&Device::default()).unwrap();
    let dense = shop.path("dense");
    write_expected(&dense, &model, Some(&Tokenizer::from_file(&dense.join("tokenizer.json")).unwrap()));
    python("interop_model.py", &["check", dense.to_str().unwrap()]);
}

#[test]
#[ignore = "needs LOWRANK_PYTHON"]
fn transformers_opens_untied_grouped_and_sharded_models() {
    let mut config = LlamaConfig::named("llama-9m", 211).unwrap();
    (config.num_hidden_layers, config.initializer_range, config.rope_theta) = (3, 0.1, 5e5);
    for (tied, kv_heads, shard) in [(true, 4, u64::MAX), (false, 2, u64::MAX), (false, 1, 300_000)] {
        (config.tie_word_embeddings, config.num_key_value_heads) = (tied, kv_heads);
        let model = Llama::random(&config, 9, &Device::default()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        save(&model, &serde_json::Map::new(), dir.path(), shard).unwrap();
        assert_eq!(dir.path().join("model.safetensors").exists(), shard == u64::MAX);
        let again = ModelFolder::open(dir.path()).unwrap().load(&Device::default()).unwrap();
        let ids = || ids_tensor(&[1, 2, 3, 210], 1, &Device::default());
        assert_eq!(
            values(again.logits(ids(), None)),
            values(model.logits(ids(), None)),
            "a model that was read back has other logits"
        );
        write_expected(dir.path(), &model, None);
        python("interop_model.py", &["check", dir.path().to_str().unwrap()]);
    }
}

#[test]
#[ignore = "needs LOWRANK_PYTHON"]
fn transformers_opens_every_family() {
    for family in Family::ALL {
        let model = small_families::model(&small_families::config(family), &Device::default());
        let dir = tempfile::tempdir().unwrap();
        save(&model, &serde_json::Map::new(), dir.path(), u64::MAX).unwrap();
        write_expected(dir.path(), &model, None);
        python("interop_model.py", &["check", dir.path().to_str().unwrap()]);
    }
}

/// The folder of a Qwen3 rounded to 16 bits, its adapter merged into it, still has 16 bits.
#[test]
#[ignore = "needs LOWRANK_PYTHON"]
fn transformers_opens_a_merged_model_of_16_bits() {
    let shop = Workshop::new(1);
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/interop-families/qwen3");
    let base = base.to_str().unwrap();
    let lines: Vec<String> = (0..20)
        .map(|i| format!("{{\"prompt\": \"w{} w{} \", \"completion\": \"w{}\"}}", 3 + i, 5 + i, 4 + i))
        .collect();
    std::fs::write(shop.path("examples.jsonl"), lines.join("\n")).unwrap();
    succeeded(shop.run(&["export", "--model", base, "--dtype", "bf16", "--out", "model"]));
    succeeded(shop.run(&shop.tuned("run", &["--rank", "2", "--steps", "4"])));
    let adapter = checkpoints(&shop.path("run")).pop().unwrap();
    succeeded(shop.run(&["merge", "--model", "model", "--adapter", adapter.to_str().unwrap(), "--out", "merged"]));
    let merged = shop.path("merged");
    write_expected(&merged, &ModelFolder::open(&merged).unwrap().load(&Device::default()).unwrap(), None);
    std::fs::remove_file(merged.join("tokenizer.json")).unwrap();
    python("interop_model.py", &["check", merged.to_str().unwrap(), "bfloat16"]);
}

#[test]
#[ignore = "needs LOWRANK_PYTHON"]
fn a_sharded_model_of_transformers_has_the_same_logits_here() {
    let dir = tempfile::tempdir().unwrap();
    python("interop_model.py", &["write", dir.path().to_str().unwrap()]);
    let folder = ModelFolder::open(dir.path()).unwrap();
    assert_eq!(folder.config.extra["eos_token_id"], 5);
    let model = folder.load(&Device::default()).unwrap();
    let bytes = std::fs::read(dir.path().join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let ids: Vec<i32> =
        file.tensor("ids").unwrap().data().as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as i32).collect();
    let expected: Vec<f32> =
        file.tensor("logits").unwrap().data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let ours = values(model.logits(ids_tensor(&ids, 2, &Device::default()), None));
    let worst = ours.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-4, "{worst}");
}

/// A base, one sub-folder an adapter, and the logits that Python must find with each; the merged model of the last is written as well.
#[test]
#[ignore = "needs LOWRANK_PYTHON"]
fn peft_reads_our_adapters() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = LlamaConfig::named("llama-9m", 97).unwrap();
    (config.hidden_size, config.intermediate_size, config.head_dim) = (32, 48, 8);
    (config.num_hidden_layers, config.num_key_value_heads, config.initializer_range) = (3, 2, 0.2);
    let base = Llama::random(&config, 3, &Device::default()).unwrap();
    let write = |model: &Llama, name: &str| {
        let dir = dir.path().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        write_expected(&dir, model, None);
        dir
    };
    save(&base, &serde_json::Map::new(), &write(&base, "model"), u64::MAX).unwrap();
    for (name, config) in exchanged() {
        let model = adapted(&base, &config);
        peft::save(&model, "default", peft::Form::Peft, Some("model"), &write(&model, name)).unwrap();
        let mut written = vec![name];
        if name == "triplet" {
            peft::save_adalora(&model, "default", Some("model"), &write(&model, "adalora")).unwrap();
            written.push("adalora");
        }
        let whole = merged(model).unwrap();
        for name in written {
            save(&whole, &serde_json::Map::new(), &write(&whole, &format!("merged/{name}")), u64::MAX).unwrap();
        }
    }
    python("interop_peft.py", &["check", dir.path().to_str().unwrap()]);
}

/// Compositions of two adapters by the program, against those of peft.
#[test]
#[ignore = "needs LOWRANK_PYTHON"]
fn peft_composes_adapters_to_the_same_logits() {
    let shop = Workshop::new(0);
    let mut config = LlamaConfig::named("llama-9m", 97).unwrap();
    (config.hidden_size, config.intermediate_size, config.head_dim) = (32, 48, 8);
    (config.num_hidden_layers, config.num_key_value_heads, config.initializer_range) = (2, 2, 0.2);
    let base = Llama::random(&config, 3, &Device::default()).unwrap();
    ["model", "one", "two"].iter().for_each(|name| std::fs::create_dir(shop.path(name)).unwrap());
    save(&base, &serde_json::Map::new(), &shop.path("model"), u64::MAX).unwrap();
    for (name, seed) in [("one", 1), ("two", 2)] {
        let lora = AdapterConfig { seed, ..AdapterConfig::new("lora").with_rank(4).with_alpha(8.0) };
        let model = adapted(&base, &lora);
        peft::save(&model, "default", peft::Form::Peft, Some("model"), &shop.path(name)).unwrap();
    }
    let both = ["--adapter", "one=0.7", "--adapter", "two=0.4"];
    for (method, folder, set) in [
        ("linear", "linear", None),
        ("cat", "cat", None),
        ("svd", "svd", Some("rank=4")),
        ("ties", "ties", Some("density=0.5")),
        ("magnitude-prune", "magnitude_prune", Some("density=0.5")),
    ] {
        let out = format!("composed/{folder}");
        let mut args = [&["compose", "--method", method, "--out", &out][..], &both].concat();
        args.extend(set.into_iter().flat_map(|set| ["--set", set]));
        succeeded(shop.run(&args));
    }
    python("interop_peft.py", &["combined", shop.dir.path().to_str().unwrap()]);
}

/// A fine-tuned adapter as the program leaves it, and the folder that `lowrank merge` makes of it. `LOWRANK_TEST_MODEL` and `LOWRANK_TEST_ADAPTER` name
/// folders to look at in place of a tiny model; `--nocapture` shows the differences.
#[test]
#[ignore = "needs LOWRANK_PYTHON"]
fn a_fine_tuned_model_says_the_same_in_python() {
    let shop = Workshop::with_model(60);
    let given = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let (model, adapter) = match (given("LOWRANK_TEST_MODEL"), given("LOWRANK_TEST_ADAPTER")) {
        (Some(model), Some(adapter)) => (model, adapter),
        _ => {
            succeeded(shop.run(&shop.tuned("run", &["--rank", "4", "--alpha", "8", "--steps", "60"])));
            (shop.path("model"), checkpoints(&shop.path("run")).pop().unwrap())
        }
    };
    let [model_text, adapter_text] = [&model, &adapter].map(|path| path.to_str().unwrap());
    succeeded(shop.run(&["merge", "--model", model_text, "--adapter", adapter_text, "--out", "merged"]));

    let text =
        "pub fn rank(self) -> usize\nReturns the smaller side of the weights, größer als 日本語, in every row of it.";
    let ids = Tokenizer::from_file(&model.join("tokenizer.json")).unwrap().encode(text).unwrap();
    let ids: Vec<i32> = ids.into_iter().map(|id| id as i32).collect();
    let logits = |model: &Llama| model.logits(ids_tensor(&ids, 1, &Device::default()), None);
    let base = ModelFolder::open(&model).unwrap().load(&Device::default()).unwrap();
    let (tuned, _) = peft::PeftFolder::open(&adapter).unwrap().attach(base).unwrap();
    let ours = logits(&tuned);
    let merged = ModelFolder::open(&shop.path("merged")).unwrap().load(&Device::default()).unwrap();
    let apart = (logits(&merged) - ours.clone()).abs().max().into_scalar::<f32>();
    println!("logits of the merged model differ by {apart:.1e} here");
    assert!(apart < 1e-3, "{apart}");

    let follows = generate(&tuned.valid(), &ids[..16], 32, &Sampling::greedy(), |_| true).unwrap();
    let written = [&ids[..16], &follows].concat();

    let shape = ours.dims().to_vec();
    let floats: Vec<u8> = values(ours).iter().flat_map(|value| value.to_le_bytes()).collect();
    let wide = |ids: &[i32]| ids.iter().flat_map(|id| i64::from(*id).to_le_bytes()).collect::<Vec<u8>>();
    let (all, greedy) = (wide(&ids), wide(&written));
    let tensors = [
        ("ids", TensorView::new(Dtype::I64, vec![1, ids.len()], &all).unwrap()),
        ("logits", TensorView::new(Dtype::F32, shape, &floats).unwrap()),
        ("greedy", TensorView::new(Dtype::I64, vec![1, written.len()], &greedy).unwrap()),
    ];
    let file = shop.path("expected.safetensors");
    safetensors::serialize_to_file(tensors, None, &file).unwrap();
    let merged = shop.path("merged");
    python("interop_peft.py", &["tuned", model_text, adapter_text, merged.to_str().unwrap(), file.to_str().unwrap()]);
}

/// SmolLM2-135M-Instruct as the file that a package carries, as a file and a folder made of it, and in Python.
#[test]
#[ignore = "needs LOWRANK_PYTHON"]
fn a_real_model_says_the_same_as_file_as_folder_and_in_python() {
    let shop = Workshop::new(0);
    let dir = shop.path("fetched");
    python("interop_model.py", &["fetch", dir.to_str().unwrap()]);
    let files = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path());
    let file = files.into_iter().find(|path| path.extension().is_some_and(|end| end == "gguf")).unwrap();
    let original = file.to_str().unwrap();
    succeeded(shop.run(&["export", "--model", original, "--out", "folder"]));
    let words = ["export", "--model", original, "--format", "gguf", "--dtype", "f32", "--out", "again.gguf"];
    succeeded(shop.run(&words));
    let tokenizer = Tokenizer::from_file(&shop.path("folder/tokenizer.json")).unwrap();
    let mut expected = BTreeMap::new();
    for path in [file, shop.path("again.gguf"), shop.path("folder")] {
        let model = ModelFolder::open(&path).unwrap().load(&Device::default()).unwrap().valid();
        for prompt in ["The capital of France is", "def fibonacci(n):\n", "größer als 日本語"] {
            let ids: Vec<i32> = tokenizer.encode(prompt).unwrap().into_iter().map(|id| id as i32).collect();
            let made = generate(&model, &ids, 32, &Sampling::greedy(), |_| true).unwrap();
            let first = expected.entry(prompt).or_insert_with(|| made.clone());
            assert_eq!(*first, made, "{prompt} in {}", path.display());
        }
    }
    std::fs::write(shop.path("greedy.json"), serde_json::to_string(&expected).unwrap()).unwrap();
    python("interop_model.py", &["greedy", shop.dir.path().to_str().unwrap()]);
}

#[test]
#[ignore = "needs LOWRANK_PYTHON"]
fn tensorboard_reads_a_run_that_was_resumed() {
    let shop = Workshop::new(30);
    let more = [
        "--steps",
        "12",
        "--set",
        "checkpoint.every=5",
        "--set",
        "eval.every=4",
        "--set",
        "log.histograms_every=6",
        "--set",
        "schedule.kind=constant",
    ];
    succeeded(shop.run(&shop.tiny("run", &more)));
    succeeded(shop.run(&["pretrain", "--quiet", "--resume", "--out", "run", "--steps", "20"]));
    python("interop_tensorboard.py", &[shop.path("run").to_str().unwrap()]);
}

#[test]
#[ignore = "needs LOWRANK_PYTHON"]
fn transformers_and_peft_open_vision_transformers() {
    let shop = Workshop::new(0);
    let draw = |folder: &str, classes: usize| {
        for number in 0..classes * 8 {
            let (class, width, height) = (number % classes, 20 + number % 30, 45 - number % 23);
            let value = |i: usize| ((i * i + 29 * i + 13 * number) % 97 + if i % 3 == class { 150 } else { 20 }) as u8;
            let picture = Picture { width, height, pixels: (0..3 * width * height).map(value).collect() };
            let dir = shop.path(folder).join(format!("c{class}"));
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(dir.join(format!("{number:02}.png")), picture.png().unwrap()).unwrap();
        }
    };
    draw("images", 2);
    draw("more", 3);
    let run = |command: &str, model: &str, data: &str, out: &str| {
        let sets = ["data.validation_fraction=0.2", "model.num_hidden_layers=2", "schedule.warmup_steps=2"];
        let sets = sets.into_iter().filter(|set| command == "pretrain" || !set.starts_with("model."));
        let args =
            [command, "--quiet", "--model", model, "--data", data, "--out", out, "--steps", "6", "--lr", "0.003"];
        let args: Vec<&str> = args.into_iter().chain(sets.flat_map(|set| ["--set", set])).collect();
        succeeded(shop.run(&args));
        checkpoints(&shop.path(out)).pop().unwrap().to_str().unwrap().to_string()
    };
    let base = run("pretrain", "vit-micro", "images", "base");
    let adapter = run("finetune", &base, "more", "tuned");
    let path = |name: &str| shop.path(name).to_str().unwrap().to_string();
    let (data, embeddings, adapted, merged) = (path("more"), path("e"), path("a"), path("merged"));
    succeeded(shop.run(&["embed", "--quiet", "--model", &base, "--data", &data, "--out", &embeddings]));
    let with = ["embed", "--quiet", "--model", &base, "--adapter", &adapter, "--data", &data, "--out", &adapted];
    succeeded(shop.run(&with));
    succeeded(shop.run(&["merge", "--model", &base, "--adapter", &adapter, "--out", &merged]));
    python("interop_vision.py", &[&base, &adapter, &merged, &embeddings, &adapted]);

    let clip = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/interop-vit/clip");
    let clip = clip.to_str().unwrap();
    let (adapter, adapted, merged) = (run("finetune", clip, "more", "clip"), path("c"), path("clip-merged"));
    let with = ["embed", "--quiet", "--model", clip, "--adapter", &adapter, "--data", &data, "--out", &adapted];
    succeeded(shop.run(&with));
    succeeded(shop.run(&["merge", "--model", clip, "--adapter", &adapter, "--out", &merged]));
    python("interop_vision.py", &[clip, &adapter, &merged, &adapted]);
}

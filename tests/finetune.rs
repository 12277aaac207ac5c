//! `lowrank finetune`: what it learns, what it leaves, what it refuses.

#[path = "program.rs"]
mod program;

use std::path::Path;

use program::{Workshop, checkpoints, metrics, refused, stderr, succeeded, summary, tensors};

fn losses(run: &Path) -> Vec<f64> {
    metrics(run).iter().filter_map(|line| line["loss"].as_f64()).collect()
}

#[test]
fn an_adapter_learns_and_is_saved_alone() {
    let shop = Workshop::with_model(60);
    let before = std::fs::read(shop.path("model/model.safetensors")).unwrap();
    let more = ["--rank", "4", "--alpha", "8", "--epochs", "6"];
    succeeded(shop.run(&shop.tuned("run", &more)));
    let losses = losses(&shop.path("run"));
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    assert!(mean(&losses[losses.len() - 9..]) < 0.9 * mean(&losses[..9]), "{losses:?}");

    let saved = checkpoints(&shop.path("run")).pop().unwrap();
    assert!(!saved.join("model.safetensors").exists() && saved.join("adapter_config.json").exists());
    let size = std::fs::metadata(saved.join("adapter_model.safetensors")).unwrap().len();
    assert!(size < before.len() as u64 / 4, "{size} bytes");
    assert_eq!(std::fs::read(shop.path("model/model.safetensors")).unwrap(), before);

    let adapter = saved.to_str().unwrap();
    succeeded(shop.run(&["inspect", adapter]));
    let written = |more: &[&str]| {
        let args = ["generate", "--model", "model", "--greedy", "--tokens", "8", "--prompt", "the model 3: "];
        succeeded(shop.run(&[&args, more].concat())).stdout
    };
    assert_ne!(written(&["--adapter", adapter]), written(&[]));

    let summary = summary(&shop.path("run"));
    let value = |key: &str| summary[key].as_u64().unwrap();
    // Of each of two blocks four layers [32, 32] and three between 32 and 48, rank 4.
    let trained = 2 * 4 * (4 * (32 + 32) + 3 * (32 + 48));
    assert_eq!(value("parameters"), trained);
    assert_eq!((value("gradient_bytes"), value("optimizer_state_bytes")), (4 * trained, 8 * trained));
    // About 57 examples in six epochs of batches of two.
    assert!((160..=180).contains(&value("steps")), "{summary}");
    assert!(summary["final_validation_loss"].is_number() && summary["validation_bits_per_byte"].is_null());
}

#[test]
fn steps_that_are_given_replace_the_epochs_of_the_default() {
    let shop = Workshop::with_model(20);
    // Three epochs would be about 30 steps.
    succeeded(shop.run(&shop.tuned("steps", &["--rank", "2", "--steps", "50"])));
    assert_eq!(summary(&shop.path("steps"))["steps"], 50);
    succeeded(shop.run(&shop.tuned("both", &["--rank", "2", "--steps", "50", "--epochs", "1"])));
    assert_eq!(summary(&shop.path("both"))["steps"], 10);
}

#[test]
fn an_adapter_of_a_folder_is_trained_on() {
    let shop = Workshop::with_model(60);
    let first = ["--rank", "4", "--alpha", "8", "--epochs", "6", "--init", "pissa", "--lr", "0.002"];
    succeeded(shop.run(&shop.tuned("first", &first)));
    let saved = checkpoints(&shop.path("first")).pop().unwrap();
    let saved = saved.to_str().unwrap();
    let on = |out: &'static str, more: &[&'static str]| {
        let begin = ["--adapter", saved, "--set", "train.steps=40", "--set", "checkpoint.every=20"];
        let args = shop.tuned(out, &[]).into_iter().chain(begin).chain(more.iter().copied()).collect::<Vec<_>>();
        shop.run(&args)
    };
    succeeded(on("second", &["--rule", "lora-plus"]));
    succeeded(on("still", &["--steps", "1", "--lr", "1e-9"]));
    let validation = |run: &str| summary(&shop.path(run))["final_validation_loss"].as_f64().unwrap();
    assert!((validation("still") - validation("first")).abs() < 1e-5, "it begins where the other one ended");
    assert!((validation("second") - validation("first")).abs() > 1e-3);
    let again = checkpoints(&shop.path("second"));
    let config = std::fs::read_to_string(again[1].join("adapter_config.json")).unwrap();
    assert!(config.contains("\"r\": 4") && config.contains("pissa"), "{config}");

    // It resumes without the folder that it began with being what it was.
    std::fs::remove_dir_all(&again[1]).unwrap();
    let before = tensors(&again[0]);
    succeeded(shop.run(&["finetune", "--quiet", "--resume", "--out", "second"]));
    assert!(tensors(&again[0]) == before && again[1].exists());

    refused(&on("out", &["--rank", "4"]), &["adapter.name", saved, "take the other adapter.* keys away"]);
    refused(&on("out", &["--rule", "allora"]), &["alpha", "allora"]);
    std::fs::remove_file(Path::new(saved).join("adapter_config.json")).unwrap();
    refused(&on("out", &[]), &["adapter_config.json"]);
    assert!(!shop.path("out").exists());
}

#[test]
fn everything_can_be_trained_too_and_the_tokenizer_files_go_along() {
    let shop = Workshop::with_model(20);
    std::fs::write(shop.path("model/chat_template.jinja"), "{{ messages[0].content }}").unwrap();
    succeeded(shop.run(&shop.tuned("run", &["--adapter", "none", "--steps", "5"])));
    let saved = checkpoints(&shop.path("run")).pop().unwrap();
    for name in ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        assert!(saved.join(name).exists(), "{name}");
    }
    succeeded(shop.run(&["generate", "--model", saved.to_str().unwrap(), "--tokens", "4"]));
    let summary = summary(&shop.path("run"));
    assert_eq!(summary["gradient_bytes"], summary["weight_bytes"]);
}

#[test]
fn packed_rows_and_block_by_block_learn_the_same_examples() {
    let shop = Workshop::with_model(40);
    let tokens = |out: &'static str, more: &[&'static str]| {
        let once = ["--epochs", "1", "--set", "train.batch=1"];
        succeeded(shop.run(&shop.tuned(out, &[&once, more].concat())));
        (summary(&shop.path(out))["tokens"].as_u64().unwrap(), losses(&shop.path(out)))
    };
    let (whole, plain) = tokens("plain", &["--set", "optimizer.clip=0"]);
    let (blocks, by_block) = tokens("blocks", &["--set", "optimizer.clip=0", "--backward", "per-layer"]);
    assert_eq!((whole, plain.len()), (blocks, by_block.len()));
    for (a, b) in plain.iter().zip(&by_block) {
        assert!((a - b).abs() <= 1e-4 * a, "{plain:?} and {by_block:?}");
    }
    let (packed, rows) = tokens("packed", &["--set", "data.packing=true"]);
    assert_eq!(packed, whole, "an epoch counts every token once");
    assert!(rows.len() < plain.len(), "{} rows", rows.len());
}

#[test]
fn conversations_need_a_chat_template() {
    let shop = Workshop::with_model(4);
    let chat = |number: usize| {
        format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"{number}?\"}}, {{\"role\": \"assistant\", \"content\": \"yes\"}}]}}"
        )
    };
    std::fs::write(shop.path("examples.jsonl"), (0..30).map(chat).collect::<Vec<_>>().join("\n")).unwrap();
    let run = |out: &'static str| shop.run(&shop.tuned(out, &["--steps", "3"]));
    refused(&run("none"), &["examples.jsonl line 1", "no chat template"]);
    let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    std::fs::write(shop.path("model/chat_template.jinja"), template).unwrap();
    succeeded(run("chat"));
    // "yes" and the end of the text.
    assert_eq!(summary(&shop.path("chat"))["tokens"], 3 * 2 * 4);
    std::fs::write(shop.path("model/chat_template.jinja"), "{% for %}").unwrap();
    refused(&run("broken"), &["chat_template.jinja", "chat template"]);
}

#[test]
fn a_start_from_gradients_reads_the_training_data() {
    let shop = Workshop::with_model(20);
    let settings = ["--adapter", "lora-xs", "--init", "lora-sb", "--rank", "4", "--steps", "3"];
    refused(&shop.run(&shop.tuned("run", &settings)), &["adapter.init_samples = 50", "19 rows"]);
    let run = |out: &'static str, alpha: &'static str| {
        let more = ["--alpha", alpha, "--set", "adapter.init_samples=5"];
        stderr(&succeeded(shop.run(&shop.tuned(out, &[&settings[..], &more].concat()))))
    };
    assert!(!run("usual", "4").contains("alpha"));
    let message = run("scaled", "16");
    assert!(message.contains("alpha 16 at rank 4: the update is multiplied by 4"), "{message}");
    assert_eq!(message.matches("multiplied").count(), 1, "{message}");
}

#[test]
fn what_matches_no_layer_beside_what_does_is_told() {
    let shop = Workshop::with_model(20);
    let message = |settings: &[&str]| {
        let more: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).chain(["--steps", "1"]).collect();
        let message = stderr(&succeeded(shop.run(&shop.tuned("run", &more))));
        std::fs::remove_dir_all(shop.path("run")).unwrap();
        message
    };
    for (setting, part) in [
        ("adapter.targets=q_proj,x_proj", "adapter.targets: no linear layer matches x_proj"),
        ("adapter.exclude=k_prj", "adapter.exclude: no linear layer matches k_prj"),
        ("adapter.layers=[1, 7]", "adapter.layers: no linear layer stands in block 7"),
    ] {
        let text = message(&[setting]);
        assert!(text.contains(part), "{part} is not in: {text}");
    }
    assert_eq!(message(&["adapter.targets=q_proj,v_proj", "adapter.exclude=v_proj", "adapter.layers=[0, 1]"]), "");
}

#[test]
fn bad_settings_are_refused_and_leave_nothing() {
    let shop = Workshop::with_model(20);
    for (settings, parts) in [
        (&["adapter.name=lorra"][..], &["lorra", "lora"][..]),
        (&["adapter.rank=0"], &["rank", "from 1 to"]),
        (&["adapter.rank=many"], &["adapter.rank", "whole number"]),
        (&["adapter.alpha=0"], &["alpha", "greater than 0"]),
        (&["adapter.dropout=1"], &["dropout", "below 1"]),
        (&["adapter.init=svd"], &["init", "pissa"]),
        (&["adapter.scaling=half"], &["adapter.scaling", "half"]),
        (&["adapter.targets=x_proj"], &["x_proj", "model.layers.0"]),
        (&["adapter.layers=7"], &["no linear layer"]),
        (&["adapter.rank_pattern=q_proj"], &["rank_pattern", "PATTERN=NUMBER"]),
        (&["adapter.rank_pattern=x_proj=3"], &["x_proj"]),
        (&["adapter.options.blocks=3"], &["adapter.options.blocks"]),
        (&["adapter.name=block-lora", "adapter.options.blocks=3"], &["3 blocks", "rank 8"]),
        (&["adapter.name=block-lora", "adapter.options.blocks=many"], &["blocks", "many"]),
        (&["rule.name=lora-max"], &["lora-max", "lora-pro"]),
        (&["rule.name=lora-plus", "rule.options.ratio=0"], &["ratio", "greater than 0"]),
        (&["rule.name=lora-plus", "rule.options.ratoi=2"], &["ratoi", "rule.options.ratio"]),
        (&["rule.name=allora", "adapter.alpha=16"], &["alpha", "allora"]),
        (&["rule.name=allora", "adapter.dropout=0.1"], &["dropout", "allora"]),
        (&["rule.name=lora-pro", "adapter.name=dora"], &["lora-pro", "dora"]),
        (&["rule.name=lora-pro", "optimizer.name=muon"], &["muon", "adamw"]),
        (&["rule.name=lora-pro", "optimizer.exclude=q_proj"], &["exclude = q_proj", "training rule"]),
        (&["rule.name=lora-pro", "optimizer.weight_decay=0.1"], &["optimizer.weight_decay = 0.1", "set it to 0"]),
        (
            &["rule.name=lora-pro", "rule.options.mode=sgd", "optimizer.weight_decay=0.1"],
            &["weight_decay = 0.1", "sgd"],
        ),
        (&["adapter.name=none", "rule.name=lora-plus"], &["lora-plus", "adapter"]),
        (&["adapter.name=none", "adapter.rank=4"], &["none", "adapter.*"]),
        (&["model.hidden_size=64"], &["model.hidden_size", "finetune"]),
        (&["tokenizer.path=bytes"], &["tokenizer.path", "finetune"]),
        (&["train.tokens=1000"], &["train.tokens", "finetune"]),
        (&["train.epochs=0"], &["no end"]),
        (&["train.epochs=0", "train.minutes=1"], &["schedule.kind"]),
        (&["train.epochs=-1"], &["train.epochs", "from 0 to"]),
        (&["train.seq_len=129"], &["129", "128 positions"]),
        (&["data.format=text"], &["data.format", "jsonl"]),
        (&["train.backward=per-layer"], &["optimizer.clip", "block_clip"]),
    ] {
        let more: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
        refused(&shop.run(&shop.tuned("run", &more)), parts);
        assert!(!shop.path("run").exists(), "{settings:?} left a folder");
    }
    let flags = ["--set", "adapter.rank=4"];
    refused(&shop.run(&shop.tiny("run", &flags)), &["adapter.rank", "pretrain"]);
    refused(&shop.run(&["finetune", "--data", "examples.jsonl"]), &["--model"]);
    refused(&shop.run(&["finetune", "--model", "model", "--seq-len", "48"]), &["--data"]);
}

#[test]
fn bad_examples_are_refused_by_file_and_line() {
    let shop = Workshop::with_model(4);
    let good = "{\"text\": \"fine\"}\n";
    for (line, parts) in [
        ("{\"body\": \"x\"}", &["needs \"messages\"", "body"][..]),
        ("{\"text\": \"cut", &["not valid JSON"]),
        ("{\"prompt\": \"a\", \"completion\": \"\"}", &["nothing to learn"]),
        ("{\"prompt\": \"a\"}", &["completion"]),
    ] {
        std::fs::write(shop.path("examples.jsonl"), format!("{good}{line}\n{good}")).unwrap();
        let output = shop.run(&shop.tuned("run", &["--steps", "3"]));
        refused(&output, &[&["examples.jsonl line 2"], parts].concat());
        assert!(!shop.path("run").exists());
    }
    let long = format!("{{\"prompt\": \"{}\", \"completion\": \"x\"}}\n", "a".repeat(200));
    std::fs::write(shop.path("examples.jsonl"), format!("{good}{long}")).unwrap();
    refused(&shop.run(&shop.tuned("run", &["--steps", "3"])), &["examples.jsonl line 2", "201 tokens", "seq_len = 48"]);
    std::fs::write(shop.path("examples.jsonl"), good).unwrap();
    refused(&shop.run(&shop.tuned("run", &["--steps", "3"])), &["1 examples", "two"]);
}

#[test]
fn a_bad_model_folder_is_refused_by_what_is_wrong() {
    let shop = Workshop::with_model(10);
    let run = || shop.run(&shop.tuned("run", &["--steps", "2"]));
    let config = shop.path("model/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    for (from, to, parts) in [
        ("\"llama\"", "\"gpt2\"", &["config.json", "gpt2"][..]),
        ("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3", &["model.layers.2", "missing"]),
        ("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1", &["model.layers.1", "no place"]),
        ("\"intermediate_size\": 48", "\"intermediate_size\": 40", &["model.layers.0.mlp", "shape"]),
        ("\"vocab_size\": 257", "\"vocab_size\": 200", &["257 ids", "200"]),
    ] {
        assert!(text.contains(from), "{from} is not in {text}");
        std::fs::write(&config, text.replace(from, to)).unwrap();
        refused(&run(), parts);
        assert!(!shop.path("run").exists(), "{to} left a folder");
    }
    std::fs::write(&config, &text).unwrap();
    std::fs::rename(shop.path("model/tokenizer.json"), shop.path("tokenizer.json")).unwrap();
    refused(&run(), &["tokenizer.json"]);
    std::fs::rename(shop.path("tokenizer.json"), shop.path("model/tokenizer.json")).unwrap();
    std::fs::remove_file(&config).unwrap();
    refused(&run(), &["config.json"]);
}

#[test]
fn adapters_stand_on_dense_weights() {
    let shop = Workshop::with_model(10);
    let more = ["--steps", "2", "--parameterization", "sltrain", "--set", "model.parameterization.options.rank=4"];
    succeeded(shop.run(&shop.tiny("sparse", &more)));
    std::fs::remove_dir_all(shop.path("model")).unwrap();
    std::fs::rename(checkpoints(&shop.path("sparse")).pop().unwrap(), shop.path("model")).unwrap();
    refused(&shop.run(&shop.tuned("run", &["--steps", "2"])), &["sltrain", "export it as a dense model first"]);
    assert!(!shop.path("run").exists());
}

#[test]
fn a_run_goes_on_with_what_it_was_begun_with() {
    let shop = Workshop::with_model(20);
    let more = ["--steps", "6", "--set", "checkpoint.every=3"];
    succeeded(shop.run(&shop.tuned("run", &more)));
    let resume = |more: &[&str]| shop.run(&[&["finetune", "--quiet", "--resume", "--out", "run"], more].concat());
    succeeded(resume(&[]));
    refused(&resume(&["--rank", "4"]), &["adapter.rank"]);
    refused(&resume(&["--rule", "lora-plus"]), &["rule.name"]);
    refused(&shop.run(&["pretrain", "--quiet", "--resume", "--out", "run"]), &["lowrank finetune"]);
    let weights = shop.path("model/model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    let mut other = bytes.clone();
    *other.last_mut().unwrap() ^= 1;
    std::fs::write(&weights, &other).unwrap();
    refused(&resume(&[]), &["model.name = model", "changed"]);
    std::fs::write(&weights, &bytes).unwrap();
    std::fs::write(shop.path("examples.jsonl"), "{\"text\": \"a\"}\n{\"text\": \"b\"}\n").unwrap();
    refused(&resume(&[]), &["what the model learns from changed"]);
}

#[test]
fn truncated_examples_are_told_of() {
    let shop = Workshop::with_model(10);
    let long = format!("{{\"text\": \"{}\"}}\n", "a".repeat(200));
    let text = std::fs::read_to_string(shop.path("examples.jsonl")).unwrap();
    std::fs::write(shop.path("examples.jsonl"), format!("{long}{text}")).unwrap();
    let args: Vec<&str> = shop.tuned("run", &["--steps", "2"]).into_iter().filter(|arg| *arg != "--quiet").collect();
    let output = succeeded(shop.run(&args));
    assert!(stderr(&output).contains("1 were cut to 48 tokens"), "{}", stderr(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("validation loss"));
}

#[test]
fn adapters_and_rules_are_listed_with_their_options() {
    let shop = Workshop::new(1);
    let message = |args: &[&str]| String::from_utf8(succeeded(shop.run(args)).stdout).unwrap();
    let all = message(&["methods"]);
    for entry in lowrank_models::adapter::STRUCTURES {
        assert!(all.contains(entry.entry.summary), "{}", entry.spec.name);
        let one = message(&["methods", entry.spec.name]);
        for option in entry.entry.options().iter() {
            assert!(one.contains(&option.name), "{} is not in {one}", option.name);
        }
    }
    for rule in lowrank_models::adapter::RULES {
        assert!(all.contains(rule.entry.summary), "{}", rule.entry.name);
    }
    assert!(message(&["methods", "lora-plus"]).contains("rule.options.NAME"));
    assert!(message(&["finetune", "--help"]).contains("--adapter lora --rank 16"));
}

#[test]
fn a_length_that_is_not_given_is_at_most_the_models() {
    let shop = Workshop::with_model(20);
    let path = shop.path("model/config.json");
    let config = std::fs::read_to_string(&path).expect("a configuration");
    let mut config: serde_json::Value = serde_json::from_str(&config).expect("JSON");
    config["max_position_embeddings"] = 40.into();
    std::fs::write(&path, config.to_string()).expect("a file");
    let args = ["finetune", "--model", "model", "--data", "examples.jsonl", "--steps", "2", "--adapter", "lora"];
    let args = [&args[..], &["--rank", "2", "--set", "log.sample_tokens=0"]].concat();
    let output = succeeded(shop.run(&[&args[..], &["--out", "short"]].concat()));
    assert!(stderr(&output).contains("train.seq_len = 40"), "{}", stderr(&output));
    let kept = std::fs::read_to_string(shop.path("short/config.toml")).expect("settings");
    assert!(kept.contains("seq_len = 40"), "{kept}");
    refused(&shop.run(&[&args[..], &["--out", "long", "--seq-len", "48"]].concat()), &["train.seq_len = 48", "40"]);
    succeeded(shop.run(&["plan", "--finetune", "--model", "model"]));
}

#[test]
fn examples_that_are_too_long_to_measure_are_refused_by_the_flag_or_left_out() {
    let shop = Workshop::with_model(10);
    let long = r#"{"prompt": "the model learns a small rank from rows: ", "completion": "of weights"}"#;
    let short = r#"{"prompt": "a: ", "completion": "b"}"#;
    std::fs::write(shop.path("mixed.jsonl"), format!("{long}\n{short}\n")).unwrap();
    let eval = |more: &[&str]| shop.run(&[&["eval", "--model", "model", "--seq-len", "16"], more].concat());
    refused(&eval(&["--data", "mixed.jsonl"]), &["line 1", "--seq-len = 16", "data.too_long = \"drop\""]);
    let exact = ["--examples", "mixed.jsonl", "--score", "exact"];
    refused(&eval(&exact), &["line 1", "--seq-len = 16", "data.too_long = \"drop\""]);
    for data in [&["--data", "mixed.jsonl"][..], &exact] {
        let output = succeeded(eval(&[data, &["--set", "data.too_long=drop"]].concat()));
        let shown = String::from_utf8(output.stdout).unwrap();
        assert!(shown.contains("1 left out for their length"), "{shown}");
    }
    let wrong = ["--data", "mixed.jsonl", "--set", "data.too_long=sometimes"];
    refused(&eval(&wrong), &["data.too_long", "sometimes", "truncate"]);
}

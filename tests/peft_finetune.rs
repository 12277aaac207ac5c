//! Fine-tuning of more than an adapter: modules that are trained whole, and what the program does with the folders.

#[path = "program.rs"]
mod program;

use program::{Workshop, checkpoints, refused, stderr, succeeded, summary, tensors};

#[test]
fn modules_that_are_trained_whole_are_resumed_exported_and_merged() {
    let shop = Workshop::with_model(40);
    let more = ["--rank", "4", "--steps", "6", "--set", "checkpoint.every=3", "--targets", "q_proj,v_proj"];
    let saved = ["--set", "adapter.modules_to_save=[\"embed_tokens\"]"];
    for backward in ["whole", "checkpointed", "per-layer"] {
        let out: &'static str = ["run-whole", "run-checkpointed", "run-per-layer"]
            .into_iter()
            .find(|name| name.ends_with(backward))
            .expect("a name");
        let args = [&more[..], &saved[..], &["--backward", backward, "--set", "optimizer.clip=0"]].concat();
        succeeded(shop.run(&shop.tuned(out, &args)));
        let run = shop.path(out);
        let all = checkpoints(&run);
        let after = tensors(&all[1]);
        std::fs::remove_dir_all(&all[1]).unwrap();
        succeeded(shop.run(&["finetune", "--quiet", "--resume", "--out", out]));
        assert!(tensors(&all[1]) == after, "{backward}: another adapter after a resume");
    }
    // The embedding, which serves as head here, counts as trained.
    let trained = summary(&shop.path("run-whole"))["parameters"].as_u64().unwrap();
    succeeded(shop.run(&shop.tuned("plain", &more)));
    let alone = summary(&shop.path("plain"))["parameters"].as_u64().unwrap();
    let vocabulary = (trained - alone) / 32;
    assert!(vocabulary > 200 && (trained - alone) == 32 * vocabulary, "{trained} and {alone}");

    let checkpoint = checkpoints(&shop.path("run-whole")).pop().unwrap();
    let checkpoint = checkpoint.to_str().unwrap();
    let text = |args: &[&str]| {
        let prompt = ["--greedy", "--tokens", "8", "--prompt", "the model 3: "];
        succeeded(shop.run(&[&["generate"], args, &prompt].concat())).stdout
    };
    let expected = text(&["--model", "model", "--adapter", checkpoint]);
    assert_ne!(expected, text(&["--model", "model"]));
    succeeded(shop.run(&["export", "--model", "model", "--adapter", checkpoint, "--out", "peft"]));
    assert_eq!(text(&["--model", "model", "--adapter", "peft"]), expected);
    let config = std::fs::read_to_string(shop.path("peft/adapter_config.json")).unwrap();
    assert!(config.contains("embed_tokens") && !config.contains("\"lowrank\""), "{config}");
    succeeded(shop.run(&["merge", "--model", "model", "--adapter", checkpoint, "--out", "merged"]));
    assert_eq!(text(&["--model", "merged"]), expected);

    let again = shop.run(&["export", "--model", "model", "--adapter", checkpoint, "--out", "peft"]);
    refused(&again, &["peft exists already"]);
    let twice = ["export", "--model", "model", "--adapter", checkpoint, "--adapter", "peft", "--out", "both"];
    refused(&shop.run(&twice), &["--adapter is given 2 times"]);
    let typed = ["export", "--model", "model", "--adapter", checkpoint, "--dtype", "bf16", "--out", "typed"];
    refused(&shop.run(&typed), &["--dtype bf16", "adapters are written in f32"]);
    assert!(!shop.path("both").exists() && !shop.path("typed").exists());
}

#[test]
fn what_cannot_be_trained_beside_an_adapter_is_refused_by_its_key() {
    let shop = Workshop::with_model(20);
    for (setting, parts) in [
        ("adapter.modules_to_save=[\"no_module\"]", ["adapter.modules_to_save", "no_module"]),
        ("adapter.modules_to_save=[\"q_proj\"]", ["adapter.modules_to_save", "adapted as well"]),
        ("adapter.bias=all", ["adapter.bias", "no biases"]),
        ("adapter.bias=some", ["adapter.bias", "adapted"]),
    ] {
        let output = shop.run(&shop.tuned("run", &["--set", setting]));
        refused(&output, &parts);
        assert!(!shop.path("run").exists(), "{setting}: {}", stderr(&output));
    }
}

/// Structures that multiply the weight or rotate the inputs have no plain LoRA, and are exported as themselves.
#[test]
fn structures_of_peft_are_trained_and_exported() {
    let shop = Workshop::with_model(20);
    for structure in ["loha", "lokr", "oft", "ia3", "hira", "shira", "fourierft"] {
        let rank: &[&str] = match structure {
            "oft" => &["--set", "adapter.options.oft_block_size=8"],
            "ia3" => &[],
            _ => &["--rank", "4"],
        };
        let args = [&["--adapter", structure, "--steps", "2"], rank].concat();
        succeeded(shop.run(&shop.tuned("run", &args)));
        let checkpoint = checkpoints(&shop.path("run")).pop().unwrap();
        let checkpoint = checkpoint.to_str().unwrap();
        succeeded(shop.run(&["inspect", checkpoint]));
        succeeded(shop.run(&["export", "--model", "model", "--adapter", checkpoint, "--out", "out"]));
        let config = std::fs::read_to_string(shop.path("out/adapter_config.json")).unwrap();
        assert!(config.contains(&format!("\"peft_type\": \"{}\"", structure.to_uppercase())), "{config}");
        std::fs::remove_dir_all(shop.path("out")).unwrap();
        std::fs::remove_dir_all(shop.path("run")).unwrap();
    }
}

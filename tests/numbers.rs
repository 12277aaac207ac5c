//! Every number of the configuration at its worst: a run, or a refusal that names the key, never a panic.

#[path = "program.rs"]
mod program;

use lowrank_train::config::{Job, sections};
use program::{Workshop, stderr};

const WORST: [&str; 8] = ["0", "-1", "9223372036854775807", "1e308", "nan", "-inf", "0.5", "1e-320"];

/// Keys of a job that are numbers, or lists of them.
fn numbers(job: Job) -> Vec<String> {
    let is_number = |schema: &serde_json::Value| {
        let kinds = [&schema["type"], &schema["items"]["type"]];
        let named = |name: &str| {
            kinds
                .iter()
                .any(|kind| *kind == name || kind.as_array().is_some_and(|all| all.iter().any(|kind| kind == name)))
        };
        named("integer") || named("number")
    };
    let keys = sections(job).into_iter().flat_map(|section| section.keys);
    keys.filter(|key| is_number(key.option.allowed.schema())).map(|key| key.name).collect()
}

fn walk(shop: &Workshop, keys: &[String], args: &dyn Fn(&str) -> Vec<String>) {
    for key in keys {
        for value in WORST {
            let setting = format!("{key}={value}");
            let args = args(&setting);
            let output = shop.run(&args.iter().map(String::as_str).collect::<Vec<_>>());
            let (code, text) = (output.status.code(), stderr(&output));
            assert!(matches!(code, Some(0 | 2)) && !text.contains("panicked"), "{setting}: {code:?}\n{text}");
            if code == Some(2) {
                let named = text.contains(key) || text.contains(key.rsplit('.').next().unwrap_or(key));
                assert!(named, "{setting} is rejected without its name: {text}");
            }
            let _ = std::fs::remove_dir_all(shop.path("run"));
        }
    }
}

fn owned(args: Vec<&str>) -> Vec<String> {
    args.into_iter().map(String::from).collect()
}

#[test]
fn numbers_of_a_pretraining_are_used_or_rejected() {
    let shop = Workshop::new(10);
    let keys = numbers(Job::Pretrain);
    assert!(keys.len() > 30 && keys.contains(&"train.batch".to_string()), "{keys:?}");
    let limits = ["--steps", "1", "--minutes", "0.02"];
    walk(&shop, &keys, &|setting| owned(shop.tiny("run", &[&limits[..], &["--set", setting]].concat())));
}

#[test]
fn numbers_of_an_adapter_are_used_or_rejected() {
    let shop = Workshop::with_model(20);
    let mut keys = numbers(Job::Finetune);
    keys.retain(|key| key.starts_with("adapter."));
    assert!(keys.len() >= 5, "{keys:?}");
    walk(&shop, &keys, &|setting| owned(shop.tuned("run", &["--steps", "1", "--set", setting])));
}

#[test]
fn plans_of_the_largest_sizes_are_made_or_rejected() {
    let shop = Workshop::new(1);
    let largest = [
        "model.hidden_size=131072",
        "model.intermediate_size=1048576",
        "model.num_hidden_layers=1024",
        "model.num_attention_heads=4096",
        "tokenizer.vocab_size=16777216",
        "train.batch=65536",
        "train.seq_len=16777216",
        "train.accumulation=65536",
    ];
    for (number, setting) in largest.iter().enumerate() {
        for settings in [vec![*setting], largest[..=number].to_vec()] {
            let mut args = vec!["plan"];
            settings.iter().for_each(|setting| args.extend(["--set", setting]));
            let output = shop.run(&args);
            let text = stderr(&output);
            assert!(matches!(output.status.code(), Some(0 | 2)) && !text.contains("panicked"), "{settings:?}: {text}");
        }
    }
}

/// Flags of a command whose values may be numbers, by its help.
fn flags(shop: &Workshop, command: &str) -> Vec<String> {
    let help = program::succeeded(shop.run(&[command, "--help"])).stdout;
    let other = ["DIR", "FILE", "PATH", "TEXT", "PROMPT", "MESSAGE", "KEY=VALUE", "KEY=VALUE...", "DEVICE", "STORAGE"];
    let flag = |line: &str| {
        let (flag, value) = line.trim_start().split_once(" <")?;
        let flag = flag.rsplit(' ').next().filter(|flag| flag.starts_with("--"))?;
        let value = value.split('>').next()?;
        (!other.contains(&value)).then(|| flag.to_string())
    };
    String::from_utf8(help).expect("text").lines().filter_map(flag).collect()
}

#[test]
fn numbers_of_flags_are_used_or_rejected() {
    let shop = Workshop::with_model(3);
    std::fs::write(shop.path("model/chat_template.jinja"), "{{ messages[0].content }}").expect("a file");
    std::fs::write(shop.path("questions.jsonl"), r#"{"prompt": "the", "choices": [" a", " b"], "answer": 0}"#)
        .expect("a file");
    let commands: [&[&str]; 5] = [
        &["generate", "--model", "model", "--prompt", "the model"],
        &["chat", "--model", "model"],
        &["eval", "--model", "model", "--data", "text"],
        &["eval", "--model", "model", "--examples", "questions.jsonl", "--score", "likeliest"],
        &["tokenize", "--data", "text", "--out", "tokens"],
    ];
    let mut tried = 0;
    for command in commands {
        for flag in flags(&shop, command[0]) {
            for value in WORST.iter().chain(&["18446744073709551615", "4294967296"]) {
                let setting = format!("{flag}={value}");
                let output = shop.run(&[command, &[&setting]].concat());
                let (code, text) = (output.status.code(), stderr(&output));
                let what = format!("{} {setting}", command[0]);
                assert!(matches!(code, Some(0 | 2)) && !text.contains("panicked"), "{what}: {code:?}\n{text}");
                let _ = std::fs::remove_dir_all(shop.path("tokens"));
                tried += 1;
            }
        }
    }
    assert!(tried > 200, "{tried}");
}

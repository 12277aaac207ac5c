//! Every reader of files that come from outside, with a folder that it reads without an error.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use lowrank_models::hub::peft::PeftFolder;
use lowrank_models::hub::{Generation, HubConfig, ModelFolder};
use lowrank_train::config::{Config, Job, Layers};
use lowrank_train::data::{
    ChatTemplate, Conversation, ExampleOptions, Examples, Format, HeldOut, Json, ShardWriter, Shards, Source,
    Tokenizer, TooLong,
};
use lowrank_train::run::checkpoint::{CheckpointError, Checkpoints, TrainerState, verify};
use lowrank_train::run::report::MetricsFile;

/// Files of a folder by their names.
pub type Files = BTreeMap<String, Vec<u8>>;

type Read = Result<(), Box<dyn Error>>;

/// A reader.
pub struct Target {
    pub name: &'static str,
    /// Folders that are read without an error.
    pub seeds: Vec<Files>,
    /// Reads a folder, as far as a user's command would.
    pub read: fn(&Path) -> Read,
}

pub fn targets() -> Vec<Target> {
    let target = |name, seeds, read: fn(&Path) -> Read| Target { name, seeds, read };
    vec![
        target("settings", vec![settings()], read_settings),
        target("model", vec![folder("golden/interop-peft/model"), folder("reports/model")], read_model),
        target(
            "adapter",
            ADAPTERS.map(|name| folder(&format!("golden/interop-peft-more/{name}"))).to_vec(),
            read_adapter,
        ),
        target(
            "tokenizer",
            vec![only(folder("reports/model"), "tokenizer"), folder("reports/pieces/model")],
            read_tokenizer,
        ),
        target("template", vec![template(), folder("reports/generation-blocks/model")], read_template),
        target(
            "documents",
            vec![only(folder("reports/marks"), "marked"), folder("reports/json-files")],
            read_documents,
        ),
        target("examples", vec![folder("reports/messages"), folder("reports/pairs")], read_examples),
        target("tokens", vec![tokens()], read_tokens),
        target("checkpoint", vec![checkpoint()], read_checkpoint),
        target(
            "metrics",
            vec![one("metrics.jsonl", "{\"step\":1,\"loss\":2.5}\n{\"step\":2,\"loss\":2.25}\n")],
            read_metrics,
        ),
    ]
}

fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
}

/// Files of a folder of the tests, except descriptions of cases.
fn folder(name: &str) -> Files {
    let path = here().join(name);
    let entries = std::fs::read_dir(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let files = entries.map(|entry| entry.expect("an entry").path()).filter(|path| path.is_file());
    let name = |path: &Path| path.file_name().expect("a name").to_string_lossy().into_owned();
    files
        .filter(|path| name(path) != "case.json")
        .map(|path| (name(&path), std::fs::read(&path).expect("a file")))
        .collect()
}

fn only(files: Files, start: &str) -> Files {
    files.into_iter().filter(|(name, _)| name.starts_with(start)).collect()
}

fn one(name: &str, text: &str) -> Files {
    Files::from([(name.to_string(), text.as_bytes().to_vec())])
}

fn settings() -> Files {
    one("config.toml", &Config::of(Job::Finetune).to_toml())
}

fn read_settings(folder: &Path) -> Read {
    let mut layers = Layers::default();
    layers.file(&folder.join("config.toml"))?;
    layers.resolve(&Config::of(Job::Finetune))?;
    Ok(())
}

fn read_model(folder: &Path) -> Read {
    HubConfig::read(&folder.join("config.json"))?;
    Generation::read(folder)?;
    ModelFolder::open(folder)?.load(&Device::default())?;
    Ok(())
}

/// Adapters of every type on one model.
const ADAPTERS: [&str; 12] = [
    "adalora",
    "fourierft",
    "hira",
    "ia3",
    "loha",
    "lokr",
    "lora_embedding",
    "lora_modules_to_save",
    "lora_patterns",
    "lora_trainable_tokens",
    "oft",
    "shira",
];

fn read_adapter(folder: &Path) -> Read {
    let model = ModelFolder::open(&here().join("golden/interop-peft-more/model"))?.load(&Device::default())?;
    PeftFolder::open(folder)?.attach(model)?;
    // Not every adapter is a product of factors.
    for layer in PeftFolder::open(folder)?.factors().into_iter().flatten() {
        let _ = layer;
    }
    Ok(())
}

fn read_tokenizer(folder: &Path) -> Read {
    let tokenizer = Tokenizer::from_file(&folder.join("tokenizer.json"))?;
    let ids = tokenizer.for_documents()?.encode_whole("A text, twice: ünï <s> text.")?;
    Tokenizer::from_file(&folder.join("tokenizer.json"))?.decode(&ids)?;
    Ok(())
}

fn template() -> Files {
    let template = "{%- for m in messages %}{% if m.role == 'user' %}{{ (bos_token or '') + '[' + m.content | trim + ']' }}{% else %}\
        {% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}\
        {% set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n | tojson }}";
    let mut files = only(folder("reports/model"), "tokenizer");
    files.insert("chat_template.jinja".into(), template.as_bytes().to_vec());
    files.insert(
        "asked.json".into(),
        br#"[{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]"#.to_vec(),
    );
    files
}

fn read_template(folder: &Path) -> Read {
    let conversation = match std::fs::read(folder.join("asked.json")) {
        Ok(bytes) => Conversation::of_file(&serde_json::from_slice::<Json>(&bytes)?)?,
        Err(_) => Conversation::asking(Some("Short."), "Who?"),
    };
    if let Some(template) = ChatTemplate::read(folder)? {
        template.prompt(&conversation)?;
    }
    Ok(())
}

fn source(folder: &Path) -> Source {
    Source { paths: vec![folder.to_path_buf()], format: Format::Auto, field: "text".into() }
}

fn read_documents(folder: &Path) -> Read {
    let source = source(folder);
    source.holds()?;
    for document in source.documents()? {
        document?;
    }
    Ok(())
}

fn read_examples(folder: &Path) -> Read {
    Examples::read(&ExampleOptions {
        source: &source(folder),
        held_out: &HeldOut::Fraction(0.1),
        tokenizer: &Tokenizer::bytes()?,
        template: None,
        end: 0,
        vocab_size: 512,
        learn_prompt: false,
        seq_len: 64,
        length_key: "train.seq_len",
        too_long: TooLong::Truncate,
        seed: 1,
        cache: folder,
        fields: &[],
    })?;
    Ok(())
}

fn tokens() -> Files {
    let parent = tempfile::tempdir().expect("a folder");
    let path = parent.path().join("tokens");
    let mut writer = ShardWriter::create(&path, 300, 0, "none".into(), 64).expect("a writer");
    for document in 0..8u32 {
        let ids: Vec<u32> = (1..20).map(|id| id + document).collect();
        writer.push(&ids, 20).expect("tokens");
    }
    writer.finish().expect("tokens");
    folder(&path.to_string_lossy())
}

fn read_tokens(folder: &Path) -> Read {
    let shards = Shards::open(folder)?;
    shards.verify(&mut |_| ())?;
    shards.check_ids(300)?;
    let mut row = vec![0; 16];
    shards.read(0, &mut row)?;
    Ok(())
}

/// A saved checkpoint with one file besides the trainer's.
fn checkpoint() -> Files {
    let parent = tempfile::tempdir().expect("a folder");
    let checkpoints = Checkpoints::new(parent.path().to_path_buf(), 1, false);
    let state = TrainerState { step: 3, train_loss: Some(2.5), ..TrainerState::default() };
    let weights = |dir: &Path, _: &mut TrainerState| {
        std::fs::write(dir.join("model.safetensors"), b"weights")
            .map_err(|source| CheckpointError::Io { path: dir.to_path_buf(), source })
    };
    checkpoints.save(state, weights).expect("a checkpoint");
    let path = checkpoints.newest().expect("a folder").expect("a checkpoint");
    folder(&path.to_string_lossy())
}

fn read_checkpoint(folder: &Path) -> Read {
    verify(folder)?;
    TrainerState::read(folder)?;
    Ok(())
}

fn read_metrics(folder: &Path) -> Read {
    MetricsFile::open(&folder.join("metrics.jsonl"), 1)?;
    Ok(())
}

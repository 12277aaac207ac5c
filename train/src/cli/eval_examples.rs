//! `lowrank eval --examples`: scores of single examples.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use burn::module::Module;
use burn::tensor::Device;
use lowrank_models::Llama;
use serde_json::{Map, Value, json};

use super::output::{print, table};
use crate::build::{BuildError, Listener, source};
use crate::config::{Config, count};
use crate::data::{
    DataError, Example, ExampleOptions, HeldOut, IGNORE, Located, Location, Question, Source, TooLong, each_example,
    each_question,
};
use crate::engine::{Evaluation, example_loss, example_losses, greedy_answer, last_answer};
use crate::process::files::WholeFile;
use crate::recipe::{ModelText, check_vocabulary};
use crate::run::report::Console;

/// Number of the worst examples that are shown.
const WORST: usize = 10;
/// Characters of a text that are shown.
const SHOWN: usize = 48;

/// Score of an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Score {
    /// Cross-entropy of what counts in training
    Loss,
    /// Equality of the most likely text and the last answer of the example, but for blanks around them
    Exact,
    /// Log-likelihood of the right one of several choices, the highest or not
    Likeliest,
}

/// Examples to score.
pub struct Scored<'a> {
    pub paths: &'a [PathBuf],
    pub score: Score,
    /// File for the scores.
    pub out: Option<&'a Path>,
    pub seq_len: usize,
}

/// Result of one example.
struct Line {
    location: Location,
    loss: Evaluation,
    /// Right or wrong, if the score says so.
    right: Option<bool>,
    /// Expected text, and the model's own, if the score has them.
    texts: Option<[String; 2]>,
    /// Further entries of its record.
    record: Map<String, Value>,
}

/// Sums over examples.
#[derive(Default)]
struct Sums {
    examples: u64,
    nats: f64,
    tokens: u64,
    right: u64,
    /// Questions whose right choice is the likeliest by byte.
    right_by_byte: u64,
}

impl Scored<'_> {
    /// Scores all examples, writes the records and prints the sums and the worst examples.
    pub fn run(
        &self,
        load: impl FnOnce() -> anyhow::Result<Llama>,
        text: &ModelText,
        config: &Config,
        rows: usize,
        device: &Device,
        console: &mut Console,
    ) -> anyhow::Result<ExitCode> {
        if let Some(out) = self.out.filter(|out| out.exists()) {
            let problem = format!("--out {} exists already; name another file", out.display());
            return Err(BuildError::Settings(problem).into());
        }
        if let Some(warning) = check_vocabulary(text.tokenizer.vocab_size(), rows, self.paths[0].as_path())? {
            console.warn(&warning);
        }
        let source = Source { paths: self.paths.to_vec(), ..source(config) };
        let options = ExampleOptions {
            source: &source,
            held_out: &HeldOut::Everything,
            tokenizer: &text.tokenizer,
            template: text.template.as_ref(),
            end: text.end()?,
            vocab_size: rows,
            learn_prompt: config.data.learn_prompt && self.score == Score::Loss,
            seq_len: self.seq_len,
            length_key: "--seq-len",
            // What is cut off cannot be right; a question that is too long has a message of its own.
            too_long: match (self.score, config.data.too_long) {
                (Score::Likeliest, _) => TooLong::Drop,
                (Score::Exact, TooLong::Truncate) => TooLong::Error,
                (_, too_long) => too_long,
            },
            seed: config.train.seed,
            cache: &config.data.cache,
            fields: &[],
        };
        // Everything is read before the model is: what is wrong in the last line is told at once. Nothing is kept, so
        // that the examples may be of any number.
        console.begin("reading the examples", 0);
        let read = match self.score {
            Score::Likeliest => each_question(&options, |_| Ok::<_, DataError>(())),
            Score::Loss | Score::Exact => each_example(&options, |_| Ok::<_, DataError>(())),
        };
        let read = read.map_err(BuildError::from)?;
        if read.examples == 0 {
            return Err(BuildError::Settings(format!("every example is longer than --seq-len {}", self.seq_len)).into());
        }
        let model = load()?.valid();
        let mut results = Results { out: self.out.map(Records::create).transpose()?, ..Results::default() };
        console.begin("scoring", read.examples);
        let mut add = |line: Line| -> anyhow::Result<()> {
            results.add(line)?;
            console.advance(results.all.examples);
            Ok(())
        };
        match self.score {
            Score::Likeliest => each_question(&options, |question| add(likeliest(&model, question, text, device)?)),
            Score::Loss => each_example(&options, |located| add(of_example(&model, located, None, device)?)),
            Score::Exact => each_example(&options, |located| add(of_example(&model, located, Some(text), device)?)),
        }?;
        console.end();
        if let Some(mut records) = results.out.take() {
            for (file, sums) in &results.files {
                records.write(&self.of_file(file, sums))?;
            }
            records.finish()?;
        }
        let mut message = String::new();
        for (number, what) in [(read.cut, "cut"), (read.dropped, "left out")] {
            if number > 0 {
                message.push_str(&format!(", {} {what} for their length", count(number)));
            }
        }
        print(&self.report(&results, &message))?;
        Ok(ExitCode::SUCCESS)
    }

    /// Record of a file.
    fn of_file(&self, file: &str, sums: &Sums) -> Value {
        let mut record = json!({"file": file, "examples": sums.examples, "tokens": sums.tokens, "loss": sums.loss()});
        if self.score != Score::Loss {
            record["right"] = json!(sums.right);
        }
        if self.score == Score::Likeliest {
            record["right_by_byte"] = json!(sums.right_by_byte);
        }
        record
    }

    fn report(&self, results: &Results, message: &str) -> String {
        let Results { all, files, worst, .. } = results;
        let loss = Evaluation { nats: all.nats, tokens: all.tokens };
        let mut rows = vec![
            vec!["examples".into(), format!("{}{message}", count(all.examples))],
            vec!["tokens".into(), count(all.tokens)],
            vec!["loss".into(), format!("{:.4} nats a token", loss.loss())],
            vec!["perplexity".into(), format!("{:.2}", loss.perplexity())],
        ];
        let share = |right: u64| {
            format!("{} of {} ({:.1} %)", count(right), count(all.examples), 100.0 * right as f64 / all.examples as f64)
        };
        match self.score {
            Score::Loss => {}
            Score::Exact => rows.push(vec!["exact".into(), share(all.right)]),
            Score::Likeliest => {
                rows.push(vec!["likeliest".into(), share(all.right)]);
                rows.push(vec!["likeliest by byte".into(), share(all.right_by_byte)]);
            }
        }
        let mut text = table(&rows);
        if files.len() > 1 {
            let mut rows = vec![["FILE", "EXAMPLES", "LOSS", "RIGHT"].map(String::from).to_vec()];
            for (file, sums) in files {
                let right = if self.score == Score::Loss { String::new() } else { count(sums.right) };
                rows.push(vec![file.clone(), count(sums.examples), format!("{:.4}", sums.loss()), right]);
            }
            if self.score == Score::Loss {
                rows.iter_mut().for_each(|row| row.truncate(3));
            }
            text.push_str(&format!("\n{}", table(&rows)));
        }
        let mut rows = vec![vec!["LOSS".to_string(), "WORST EXAMPLES".into()]];
        for line in worst {
            let mut row = vec![
                format!("{:.4}", line.loss.loss()),
                format!("{}:{}", line.location.path.display(), line.location.line),
            ];
            if let (Some([expected, own]), Some(right)) = (&line.texts, line.right) {
                row.push(if right { "right".into() } else { "wrong".into() });
                row.push(format!("{} instead of {}", shown(own), shown(expected)));
                if right {
                    row.pop();
                }
            }
            rows.push(row);
        }
        text.push_str(&format!("\n{}", table(&rows)));
        text
    }
}

impl Sums {
    fn add(&mut self, line: &Line) {
        self.examples += 1;
        self.nats += line.loss.nats;
        self.tokens += line.loss.tokens;
        self.right += u64::from(line.right == Some(true));
        self.right_by_byte += u64::from(line.record.get("right_by_byte") == Some(&json!(true)));
    }

    fn loss(&self) -> f64 {
        self.nats / self.tokens as f64
    }
}

/// Sums and worst of the scored examples; its size does not depend on their number.
#[derive(Default)]
struct Results {
    all: Sums,
    files: BTreeMap<String, Sums>,
    /// The worst: wrong ones first, then by their loss.
    worst: Vec<Line>,
    out: Option<Records>,
}

impl Results {
    fn add(&mut self, line: Line) -> anyhow::Result<()> {
        if !line.loss.nats.is_finite() {
            let (path, number) = (line.location.path.display(), line.location.line);
            return Err(anyhow!(
                "{path} line {number}: the loss is {}: the weights are damaged or too large",
                line.loss.nats
            ));
        }
        self.all.add(&line);
        let file = line.location.path.to_string_lossy().into_owned();
        self.files.entry(file).or_default().add(&line);
        if let Some(out) = &mut self.out {
            out.write(&line.record())?;
        }
        let place = self.worst.partition_point(|other| other.badness(&line) != Ordering::Greater);
        if place < WORST {
            self.worst.insert(place, line);
            self.worst.truncate(WORST);
        }
        Ok(())
    }
}

impl Line {
    /// Order of the worst examples.
    fn badness(&self, other: &Self) -> Ordering {
        let right = |line: &Self| line.right == Some(true);
        right(self).cmp(&right(other)).then(other.loss.loss().total_cmp(&self.loss.loss()))
    }

    /// Record of the example.
    fn record(&self) -> Value {
        let mut record = self.record.clone();
        record.insert("file".into(), json!(self.location.path.to_string_lossy()));
        record.insert("line".into(), json!(self.location.line));
        record.insert("loss".into(), json!(self.loss.loss()));
        record.insert("tokens".into(), json!(self.loss.tokens));
        if let Some(right) = self.right {
            record.insert("right".into(), json!(right));
        }
        Value::Object(record)
    }
}

/// File of the scores.
struct Records {
    file: WholeFile,
    path: PathBuf,
}

impl Records {
    fn create(path: &Path) -> anyhow::Result<Self> {
        let file = WholeFile::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { file, path: path.to_path_buf() })
    }

    fn write(&mut self, record: &Value) -> anyhow::Result<()> {
        writeln!(self.file, "{record}").with_context(|| format!("cannot write {}", self.path.display()))
    }

    fn finish(self) -> anyhow::Result<()> {
        self.file.finish().with_context(|| format!("cannot write {}", self.path.display()))
    }
}

/// Loss of an example; with a tokenizer also the model's own answer.
fn of_example(model: &Llama, located: Located, text: Option<&ModelText>, device: &Device) -> anyhow::Result<Line> {
    let Located { location, example } = located;
    let loss = example_loss(model, &example, device);
    let Some(text) = text else {
        return Ok(Line { location, loss, right: None, texts: None, record: Map::new() });
    };
    let (prompt, expected) = last_answer(&example);
    let ends = text.all_ends()?;
    // A longer answer is another one; the model may also write a token where the example ends.
    let room = model.config().max_position_embeddings.saturating_sub(prompt.len());
    let answer = greedy_answer(model, prompt, (expected.len() + 1).min(room), &ends).map_err(BuildError::from)?;
    let expected: Vec<u32> = expected.iter().map(|id| *id as u32).filter(|id| !ends.contains(id)).collect();
    let decode = |ids: &[u32]| text.tokenizer.decode(ids).map_err(BuildError::from);
    let texts = [decode(&expected)?.trim().to_string(), decode(&answer)?.trim().to_string()];
    let mut record = Map::new();
    record.insert("expected".into(), json!(texts[0]));
    record.insert("answer".into(), json!(texts[1]));
    Ok(Line { location, loss, right: Some(texts[0] == texts[1]), texts: Some(texts), record })
}

/// Log-likelihoods of the choices of a question.
fn likeliest(model: &Llama, question: Question, text: &ModelText, device: &Device) -> anyhow::Result<Line> {
    let ends = text.all_ends()?;
    let examples: Vec<Example> = question.choices.iter().map(|(_, example)| without_end(example, &ends)).collect();
    let losses = example_losses(model, &examples, device);
    let score =
        |((choice, _), loss): (&(String, Example), Evaluation)| (-loss.nats, -loss.nats / choice.len() as f64, loss);
    let scores: Vec<(f64, f64, Evaluation)> = question.choices.iter().zip(losses).map(score).collect();
    let best = |by: fn(&(f64, f64, Evaluation)) -> f64| {
        let first = |best: usize, other: usize| if by(&scores[other]) > by(&scores[best]) { other } else { best };
        (0..scores.len()).reduce(first).unwrap_or_default()
    };
    let (chosen, by_byte) = (best(|score| score.0), best(|score| score.1));
    let texts = [question.answer, chosen].map(|number| question.choices[number].0.trim().to_string());
    let entry = |(text, score): (&(String, Example), &(f64, f64, Evaluation))| json!({"text": text.0, "log_likelihood": score.0, "tokens": score.2.tokens, "bytes": text.0.len()});
    let choices: Vec<Value> = question.choices.iter().zip(&scores).map(entry).collect();
    let mut record = Map::new();
    record.insert("choices".into(), json!(choices));
    record.insert("chosen".into(), json!(chosen));
    record.insert("answer".into(), json!(question.answer));
    record.insert("right_by_byte".into(), json!(by_byte == question.answer));
    Ok(Line {
        location: question.location,
        loss: scores[question.answer].2,
        right: Some(chosen == question.answer),
        texts: Some(texts),
        record,
    })
}

/// The example without the token that ends its answer: all choices end alike.
fn without_end(example: &Example, ends: &[u32]) -> Example {
    let mut example = example.clone();
    if let Some(last) = example.targets.iter().rposition(|target| *target != IGNORE)
        && ends.contains(&(example.targets[last] as u32))
        && example.learned() > 1
    {
        example.targets[last] = IGNORE;
    }
    example
}

/// A text in one line, cut.
fn shown(text: &str) -> String {
    let line: String = text.chars().take(SHOWN).collect();
    let dots = if line.len() < text.len() { ".." } else { "" };
    format!("{line:?}{dots}")
}

use super::*;
#[cfg(feature = "parquet")]
use std::fs::File;

fn source(path: &Path) -> Source {
    Source { paths: vec![path.to_path_buf()], format: Format::Auto, field: "text".into() }
}

#[test]
fn a_folder_gives_its_texts_in_order_and_counts_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in [
        ("b.txt", b"second".as_slice()),
        ("a/z.rs", b"first"),
        ("c.bin", b"x\0y"),
        ("d.txt", b""),
        ("e.txt", b"bad \xff"),
        (".hidden", b"hidden"),
        ("f.jsonl", b"{\"text\": \"third\"}\n\n{\"text\": \"fourth\", \"other\": 1}"),
    ] {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
    let mut documents = source(dir.path()).documents().unwrap();
    let texts: Vec<String> = documents.by_ref().map(|document| document.unwrap().text).collect();
    assert_eq!(texts, ["first", "second", "third", "fourth"]);
    assert_eq!(documents.skipped, Skipped { hidden: 1, binary: 2, own: 0, empty: 1 });
}

#[test]
fn json_files_are_lines_arrays_or_text_by_what_they_hold() {
    let dir = tempfile::tempdir().unwrap();
    let texts = |name: &str, content: &str, named: bool| -> Vec<String> {
        let folder = tempfile::tempdir_in(dir.path()).unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        let from = if named { &path } else { folder.path() };
        source(from).documents().unwrap().map(|document| document.unwrap().text).collect()
    };
    let (lines, array) =
        ("{\"text\": \"a\"}\n{\"text\": \"b\"}\n", "[\n {\"text\": \"a\"},\n {\"text\": \"b\", \"n\": [1]}\n]");
    let package = "{\n  \"name\": \"x\"\n}\n";
    for named in [true, false] {
        for (name, content) in [("x.json", lines), ("x.JSONL", lines), ("x.json", array), ("x.jsonl", array)] {
            assert_eq!(texts(name, content, named), ["a", "b"], "{name} {named}");
        }
        for content in [package, "[1, 2]", "\"x\"", "{", "{\"name\": 1}"] {
            assert_eq!(texts("x.json", content, named), [content], "{named}");
        }
    }
    // What may be meant as documents is no text either.
    for content in ["[\"a\", \"b\"]", "[[\"a\"], [\"b\"]]", "{\"data\": [{\"text\": \"a\"}]}"] {
        assert_eq!(texts("x.json", content, false), [content]);
        let path = dir.path().join("documents.json");
        std::fs::write(&path, content).unwrap();
        let refusal = source(&path).documents().unwrap().next().unwrap().unwrap_err().to_string();
        assert!(refusal.contains("documents.json holds") && refusal.contains("data.format = text"), "{refusal}");
    }
    // Other objects in a folder are not recognised.
    assert_eq!(texts("x.json", "{\"a\": 1}\n{\"a\": 2}", false), ["{\"a\": 1}\n{\"a\": 2}"]);
    let path = dir.path().join("named.json");
    std::fs::write(&path, "{\"a\": 1}\n{\"a\": 2}").unwrap();
    assert!(source(&path).documents().unwrap().next().unwrap().is_err());
}

#[test]
fn folders_of_runs_are_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    for name in
        ["runs/one/config.toml", "runs/one/metrics.jsonl", "cache/x/facts.json", "cache/x/tokenizer.json", "a.txt"]
    {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "text").unwrap();
    }
    let mut documents = source(dir.path()).documents().unwrap();
    assert_eq!(documents.by_ref().count(), 1);
    assert_eq!(documents.skipped.own, 2);
}

#[test]
fn errors_name_file_and_line() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let error = source(&path).documents().unwrap().find_map(Result::err).unwrap().to_string();
        assert!(error.contains(name), "{error}");
        error
    };
    assert!(write("a.jsonl", b"{\"text\": \"x\"}\n{\"text\": ").contains("line 2"));
    assert!(write("b.jsonl", b"\n\n{\"body\": \"x\"}").contains("line 3"));
    assert!(write("c.jsonl", b"{\"text\": 7}").contains("instead of a text"));
    assert!(write("d.txt", b"ab\xff").contains("at 2"));
    #[cfg(not(feature = "parquet"))]
    assert!(write("e.parquet", b"PAR1").contains("--features parquet"));
    assert!(source(&dir.path().join("none")).documents().is_err());
}

#[cfg(unix)]
#[test]
fn links_are_followed_and_what_is_no_file_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let below = dir.path().join("below");
    std::fs::create_dir(&below).unwrap();
    std::fs::write(dir.path().join("text"), "linked").unwrap();
    std::os::unix::fs::symlink(dir.path().join("text"), below.join("link")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(below.join("socket")).unwrap();
    let mut documents = source(&below).documents().unwrap();
    assert_eq!(documents.next().unwrap().unwrap().text, "linked");
    assert!(documents.next().is_none());
    assert_eq!(documents.skipped.binary, 1);
    assert!(source(&below.join("socket")).documents().is_err());
}

#[cfg(feature = "parquet")]
#[test]
fn parquet_gives_a_document_a_row() {
    use parquet::data_type::{ByteArray, ByteArrayType, Int32Type};
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.parquet");
    let schema = "message rows { required int32 id; required binary story (UTF8); }";
    let schema = std::sync::Arc::new(parse_message_type(schema).unwrap());
    let file = File::create(&path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Default::default()).unwrap();
    for group in 0..2 {
        let mut rows = writer.next_row_group().unwrap();
        let mut column = rows.next_column().unwrap().unwrap();
        column.typed::<Int32Type>().write_batch(&[1, 2], None, None).unwrap();
        column.close().unwrap();
        let mut column = rows.next_column().unwrap().unwrap();
        let texts = [format!("größe {group}"), String::new()].map(|text| ByteArray::from(text.as_str()));
        column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
        column.close().unwrap();
        rows.close().unwrap();
    }
    writer.close().unwrap();
    let rows = Source { field: "story".into(), ..source(&path) };
    let mut documents = rows.documents().unwrap();
    let texts: Vec<String> = documents.by_ref().map(|document| document.unwrap().text).collect();
    assert_eq!(texts, ["größe 0", "größe 1"]);
    assert_eq!(documents.skipped.empty, 2);
    let message = source(&path).documents().unwrap().next().unwrap().unwrap_err().to_string();
    assert!(message.contains("id, story"), "{message}");
    let numbers = Source { field: "id".into(), ..source(&path) };
    let message = numbers.documents().unwrap().next().unwrap().unwrap_err().to_string();
    assert!(message.contains("row 1") && message.contains("not text"), "{message}");
    std::fs::write(&path, b"PAR1 and no more").unwrap();
    assert!(rows.documents().unwrap().next().unwrap().is_err());
}

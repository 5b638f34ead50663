"use strict";
// Sorts tables, searches recordings, opens and plays their transcripts. The page is readable without it.
(() => {
  const BLOCK_SECONDS = 20; // audio per row of a transcript
  const BEFORE_SECONDS = 1; // audio played before the clicked position

  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "onclick") element.addEventListener("click", value);
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  function clock(seconds) {
    const tenths = Math.round(seconds * 10);
    const minutes = Math.floor(tenths / 600);
    const rest = ((tenths % 600) / 10).toFixed(1).padStart(4, "0");
    const shown = minutes < 60 ? `${minutes}` : `${Math.floor(minutes / 60)}:${String(minutes % 60).padStart(2, "0")}`;
    return `${shown}:${rest}`;
  }

  // Sorting: numbers by data-value, with missing values last; text in the order of the reader's locale.

  function sortable(table) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      if (!head.textContent) return;
      const button = make("button", { type: "button", class: "sort", onclick: () => sort(table, head, column) });
      button.append(...head.childNodes);
      head.append(button);
    });
  }

  function sort(table, head, column) {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const numeric = rows.some((row) => row.cells[column].dataset.value !== undefined);
    const before = head.getAttribute("aria-sort");
    const descending = before ? before === "ascending" : numeric; // first click: numbers descend, text ascends
    const keys = new Map(rows.map((row) => {
      const cell = row.cells[column];
      if (!numeric) return [row, cell.textContent];
      return [row, cell.dataset.value === undefined ? NaN : Number(cell.dataset.value)];
    }));
    const sign = descending ? -1 : 1;
    rows.sort((first, second) => {
      const [a, b] = [keys.get(first), keys.get(second)];
      if (!numeric) return sign * a.localeCompare(b, undefined, { numeric: true });
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
      return sign * (a - b);
    });
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    body.append(...rows);
  }

  // Recordings: search and links. A transcript is parsed when it is first opened or searched.

  function recordings(section) {
    const table = section.querySelector("table");
    const names = JSON.parse(section.querySelector(".system-names").textContent);
    const blocks = [...section.querySelectorAll(".transcript-data")];
    const rows = [...table.tBodies[0].rows];
    const data = (row) => JSON.parse(blocks[Number(row.dataset.place)].textContent);
    const id = (row) => row.cells[0].textContent;
    const texts = new Map();

    function textOf(row) {
      if (!texts.has(row)) {
        const columns = [...row.cells].filter((cell) => cell.dataset.value === undefined);
        const parts = columns.map((cell) => cell.textContent);
        for (const stretches of data(row).systems) {
          parts.push(stretches.map((stretch) => stretch[1]).filter(Boolean).join(" ")); // reference
          parts.push(stretches.map((stretch) => stretch[stretch.length - 1]).filter(Boolean).join(" ")); // hypothesis
        }
        texts.set(row, parts.join("\n").toLowerCase());
      }
      return texts.get(row);
    }

    const matches = make("output", {});
    const input = make("input", { type: "search", placeholder: "Search names and transcripts", "aria-label": "Search" });
    let timer = 0;
    input.addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(search, 120);
    });

    function search() {
      const query = input.value.trim().replace(/\s+/g, " ").toLowerCase();
      let count = 0;
      for (const row of rows) {
        row.hidden = query !== "" && !textOf(row).includes(query);
        count += row.hidden ? 0 : 1;
      }
      matches.textContent = `${count} of ${rows.length}`;
    }

    section.prepend(make("div", { class: "tools" }, input, matches));
    search();
    for (const row of rows) {
      const cell = row.cells[0];
      const button = make("button", { type: "button", class: "open" });
      button.append(...cell.childNodes);
      cell.append(button);
      row.addEventListener("click", () => open(id(row), data(row), names));
    }
  }

  // Transcript: rows of BLOCK_SECONDS with the hypotheses of all systems, errors marked.

  function open(title, recording, names) {
    const errors = [];
    const audio = recording.audio && make("audio", { controls: "", preload: "none", src: recording.audio });
    const status = make("output", {});
    let current = -1;

    function play(seconds) {
      if (!audio) return;
      audio.currentTime = Math.max(0, seconds - BEFORE_SECONDS);
      audio.play().catch(() => {}); // the player itself shows that a file is missing
    }

    function close() {
      if (audio) audio.pause();
      dialog.remove();
    }

    function select(place) {
      if (!errors.length) return;
      if (current >= 0) errors[current].element.classList.remove("current");
      current = (place + errors.length) % errors.length;
      const error = errors[current];
      error.element.classList.add("current");
      error.element.scrollIntoView({ block: "center" });
      status.textContent = `error ${current + 1} of ${errors.length}, at ${clock(error.time)}`;
    }

    // A stretch is [time, text] of correct words, or [time, reference, hypothesis] of an error.
    function render(stretch, end) {
      const [time, reference, hypothesis] = stretch;
      if (stretch.length === 2) {
        const text = make("span", { class: "right" }, reference);
        text.addEventListener("click", (event) => play(time + shareBefore(event, text) * Math.max(0, end - time)));
        return text;
      }
      let element;
      if (!hypothesis) element = make("del", {}, reference);
      else if (!reference) element = make("ins", {}, hypothesis);
      else element = make("span", { class: "sub" }, `${hypothesis} `, make("s", {}, reference));
      element.title = clock(time);
      const place = errors.push({ element, time, reference, hypothesis }) - 1;
      element.addEventListener("click", () => { select(place); play(time); });
      return element;
    }

    const columns = recording.systems.map((stretches) => {
      const parts = new Map();
      let block = 0; // never decreases: the order of the text is kept even if times are not sorted
      stretches.forEach((stretch, place) => {
        block = Math.max(block, Math.floor(stretch[0] / BLOCK_SECONDS));
        if (!parts.has(block)) parts.set(block, []);
        const next = stretches[place + 1];
        parts.get(block).push([stretch, next ? next[0] : recording.seconds]);
      });
      return parts;
    });
    const places = [...new Set(columns.flatMap((parts) => [...parts.keys()]))].sort((a, b) => a - b);
    const lines = places.map((block) => {
      const start = block * BLOCK_SECONDS;
      const time = make("button", { type: "button", class: "time", onclick: () => play(start) }, clock(start).slice(0, -2));
      const hypotheses = columns.map((parts, system) => {
        const line = make("p", {});
        if (names.length > 1) line.append(make("b", {}, names[system]), " ");
        for (const [stretch, end] of parts.get(block) || []) line.append(render(stretch, end), " ");
        return line;
      });
      return make("div", { class: "block" }, time, make("div", {}, ...hypotheses));
    });
    if (!lines.length) lines.push(make("p", { class: "note" }, "The reference and all hypotheses are empty."));

    const list = make("details", { class: "errors" }, make("summary", {}, "Errors and their times"));
    list.addEventListener("toggle", () => {
      if (list.children.length > 1) return;
      list.append(make("ol", {}, ...errors.map((error, place) => {
        const text = `${clock(error.time)} ${error.reference || "(none)"} \u2192 ${error.hypothesis || "(none)"}`;
        return make("li", {}, make("button", { type: "button", onclick: () => { select(place); play(error.time); } }, text));
      })));
    });

    const dialog = make("dialog", { "aria-label": title });
    const controls = make("div", { class: "tools" },
      make("button", { type: "button", class: "previous", onclick: () => select(current < 0 ? -1 : current - 1) }, "Previous error"),
      make("button", { type: "button", class: "next", autofocus: "", onclick: () => select(current + 1) }, "Next error"), status);
    const closeButton = make("button", { type: "button", class: "close", onclick: close }, "Close");
    const head = make("header", {}, make("div", { class: "title" }, make("h3", {}, title), closeButton), controls);
    if (audio) head.append(audio);
    dialog.append(head, ...(errors.length ? [list] : []), ...lines);
    dialog.addEventListener("close", close); // after the Escape key
    document.body.append(dialog);
    status.textContent = `${errors.length} ${errors.length === 1 ? "error" : "errors"}`;
    dialog.showModal();
  }

  // Share of a text before the clicked word, 0 to 1.
  function shareBefore(event, text) {
    let offset = 0;
    if (document.caretPositionFromPoint) {
      const caret = document.caretPositionFromPoint(event.clientX, event.clientY);
      if (caret && text.contains(caret.offsetNode)) offset = caret.offset;
    } else if (document.caretRangeFromPoint) {
      const caret = document.caretRangeFromPoint(event.clientX, event.clientY);
      if (caret && text.contains(caret.startContainer)) offset = caret.startOffset;
    }
    const start = text.textContent.lastIndexOf(" ", offset - 1) + 1; // start of the word
    return start / Math.max(text.textContent.length, 1);
  }

  document.querySelectorAll(".recordings").forEach(recordings);
  document.querySelectorAll("table.sortable").forEach(sortable);
})();

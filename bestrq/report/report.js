"use strict";
// Sorts tables, searches recordings, opens their transcripts. The page reads without it.
(() => {
  const BLOCK_SECONDS = 20; // of a transcript in a row of its own
  const BEFORE_SECONDS = 1; // played before the place that was clicked

  function make(tag, attributes, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "onclick") made.addEventListener("click", value);
      else made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  }

  function clock(seconds) {
    const tenths = Math.round(seconds * 10);
    const minutes = Math.floor(tenths / 600);
    const rest = ((tenths % 600) / 10).toFixed(1).padStart(4, "0");
    const shown = minutes < 60 ? `${minutes}` : `${Math.floor(minutes / 60)}:${String(minutes % 60).padStart(2, "0")}`;
    return `${shown}:${rest}`;
  }

  // Sorting: numbers by data-value, text by the reader's alphabet, what has no value last.

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
    const descending = before ? before === "ascending" : numeric; // the largest first, the first of the alphabet first
    const keys = new Map(rows.map((row) => {
      const cell = row.cells[column];
      if (!numeric) return [row, cell.textContent];
      return [row, cell.dataset.value === undefined ? NaN : Number(cell.dataset.value)];
    }));
    const sign = descending ? -1 : 1;
    rows.sort((one, other) => {
      const [a, b] = [keys.get(one), keys.get(other)];
      if (!numeric) return sign * a.localeCompare(b, undefined, { numeric: true });
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
      return sign * (a - b);
    });
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    body.append(...rows);
  }

  // Recordings. A transcript is parsed when it is opened, or searched for the first time.

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
          parts.push(stretches.map((one) => one[1]).filter(Boolean).join(" ")); // what was said
          parts.push(stretches.map((one) => one[one.length - 1]).filter(Boolean).join(" ")); // what was heard
        }
        texts.set(row, parts.join("\n").toLowerCase());
      }
      return texts.get(row);
    }

    const found = make("output", {});
    const input = make("input", { type: "search", placeholder: "Search names and transcripts", "aria-label": "Search" });
    let waiting = 0;
    input.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(search, 120);
    });

    function search() {
      const wanted = input.value.trim().replace(/\s+/g, " ").toLowerCase();
      let count = 0;
      for (const row of rows) {
        row.hidden = wanted !== "" && !textOf(row).includes(wanted);
        count += row.hidden ? 0 : 1;
      }
      found.textContent = `${count} of ${rows.length}`;
    }

    section.prepend(make("div", { class: "tools" }, input, found));
    search();
    for (const row of rows) {
      const cell = row.cells[0];
      const button = make("button", { type: "button", class: "open" });
      button.append(...cell.childNodes);
      cell.append(button);
      row.addEventListener("click", () => open(id(row), data(row), names));
    }
  }

  // A transcript: rows of BLOCK_SECONDS, in each what every system heard, errors marked.

  function open(title, recording, names) {
    const errors = [];
    const audio = recording.audio && make("audio", { controls: "", preload: "none", src: recording.audio });
    const status = make("output", {});
    let current = -1;

    function play(seconds) {
      if (!audio) return;
      audio.currentTime = Math.max(0, seconds - BEFORE_SECONDS);
      // Refused where the file is not there any more; the player says so itself.
      audio.play().catch(() => {});
    }

    function leave() {
      if (audio) audio.pause();
      dialog.remove();
    }

    function select(place) {
      if (!errors.length) return;
      if (current >= 0) errors[current].element.classList.remove("current");
      current = (place + errors.length) % errors.length;
      const one = errors[current];
      one.element.classList.add("current");
      one.element.scrollIntoView({ block: "center" });
      status.textContent = `error ${current + 1} of ${errors.length}, at ${clock(one.time)}`;
    }

    function stretch(one, until) {
      const [time, said, heard] = one;
      if (one.length === 2) {
        const text = make("span", { class: "right" }, said);
        text.addEventListener("click", (event) => play(time + shareOf(event, text) * Math.max(0, until - time)));
        return text;
      }
      let element;
      if (!heard) element = make("del", {}, said);
      else if (!said) element = make("ins", {}, heard);
      else element = make("span", { class: "sub" }, `${heard} `, make("s", {}, said));
      element.title = clock(time);
      const place = errors.push({ element, time, said, heard }) - 1;
      element.addEventListener("click", () => { select(place); play(time); });
      return element;
    }

    const columns = recording.systems.map((stretches) => {
      const parts = new Map();
      let block = 0; // texts stay in their order, whatever their times
      stretches.forEach((one, place) => {
        block = Math.max(block, Math.floor(one[0] / BLOCK_SECONDS));
        if (!parts.has(block)) parts.set(block, []);
        const next = stretches[place + 1];
        parts.get(block).push([one, next ? next[0] : recording.seconds]);
      });
      return parts;
    });
    const places = [...new Set(columns.flatMap((parts) => [...parts.keys()]))].sort((a, b) => a - b);
    const lines = places.map((block) => {
      const begin = block * BLOCK_SECONDS;
      const time = make("button", { type: "button", class: "time", onclick: () => play(begin) }, clock(begin).slice(0, -2));
      const heard = columns.map((parts, system) => {
        const line = make("p", {});
        if (names.length > 1) line.append(make("b", {}, names[system]), " ");
        for (const [one, until] of parts.get(block) || []) line.append(stretch(one, until), " ");
        return line;
      });
      return make("div", { class: "block" }, time, make("div", {}, ...heard));
    });
    if (!lines.length) lines.push(make("p", { class: "note" }, "Nothing was said, and nothing was heard."));

    const list = make("details", { class: "errors" }, make("summary", {}, "Errors and their times"));
    list.addEventListener("toggle", () => {
      if (list.children.length > 1) return;
      list.append(make("ol", {}, ...errors.map((one, place) => {
        const text = `${clock(one.time)} ${one.said || "nothing"} \u2192 ${one.heard || "nothing"}`;
        return make("li", {}, make("button", { type: "button", onclick: () => { select(place); play(one.time); } }, text));
      })));
    });

    const dialog = make("dialog", { "aria-label": title });
    const controls = make("div", { class: "tools" },
      make("button", { type: "button", class: "previous", onclick: () => select(current < 0 ? -1 : current - 1) }, "Previous error"),
      make("button", { type: "button", class: "next", autofocus: "", onclick: () => select(current + 1) }, "Next error"), status);
    const close = make("button", { type: "button", class: "close", onclick: leave }, "Close");
    const head = make("header", {}, make("div", { class: "title" }, make("h3", {}, title), close), controls);
    if (audio) head.append(audio);
    dialog.append(head, ...(errors.length ? [list] : []), ...lines);
    dialog.addEventListener("close", leave); // by the Escape key
    document.body.append(dialog);
    status.textContent = `${errors.length} ${errors.length === 1 ? "error" : "errors"}`;
    dialog.showModal();
  }

  // Which part of a text lies before the click, 0 to 1.
  function shareOf(event, text) {
    let offset = 0;
    if (document.caretPositionFromPoint) {
      const caret = document.caretPositionFromPoint(event.clientX, event.clientY);
      if (caret && text.contains(caret.offsetNode)) offset = caret.offset;
    } else if (document.caretRangeFromPoint) {
      const caret = document.caretRangeFromPoint(event.clientX, event.clientY);
      if (caret && text.contains(caret.startContainer)) offset = caret.startOffset;
    }
    const start = text.textContent.lastIndexOf(" ", offset - 1) + 1; // of the word
    return start / Math.max(text.textContent.length, 1);
  }

  document.querySelectorAll(".recordings").forEach(recordings);
  document.querySelectorAll("table.sortable").forEach(sortable);
})();

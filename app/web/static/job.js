// A job's progress as it happens. Without this script the page says how it was when it was loaded.
"use strict";
const live = document.getElementById("live");
const liveness = document.getElementById("liveness");
const stream = new EventSource(live.dataset.events);

stream.onopen = () => { liveness.textContent = "This page follows the job as it goes on."; };
stream.onerror = () => {
  liveness.textContent = stream.readyState === EventSource.CLOSED
    ? "This page no longer follows the job; load it again."
    : "The connection was lost; this page connects again.";
};
stream.addEventListener("progress", (event) => {
  const before = document.getElementById("progress").dataset.state;
  const focused = live.contains(document.activeElement) && document.activeElement.getAttribute("aria-label");
  live.innerHTML = event.data;  // rendered and escaped by the server, as in the page itself
  const now = document.getElementById("progress").dataset;
  if (focused) live.querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
  if (now.state !== before) document.getElementById("told").textContent = `The job is ${now.state}.`;
  if (now.state === "cancelling" || "ended" in now) document.getElementById("actions").hidden = true;
  if ("ended" in now) {
    stream.close();
    liveness.hidden = true;
  }
});

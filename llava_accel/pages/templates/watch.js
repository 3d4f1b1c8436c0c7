// Checks whether there is more to show. The page then reloads, at the same place, unless the reader is busy with it.
(() => {
  const state = document.getElementById("live");
  const isBusy = () => document.querySelector(".zoom input:checked, #clear:not([hidden]), details[open]") !== null;
  setInterval(async () => {
    if (document.hidden) return;
    try {
      const answer = await fetch(location.pathname, { method: "HEAD", cache: "no-store" });
      if (answer.headers.get("ETag") === `"${state.dataset.version}"`) return;
      if (!isBusy()) location.reload();
      state.textContent = "There is more to show: the page reloads once no filter is set, nothing is enlarged and nothing is unfolded.";
    } catch {
      state.textContent = "llava-accel watch has ended: this page stays as it is.";
    }
  }, 2000);
})();
